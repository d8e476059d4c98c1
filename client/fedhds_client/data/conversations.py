"""Conversations as data sets write them, each brought into a list of messages that a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any

from fedhds_client.data.bad_row import BadRow, kind_of

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_MAY_BE_EMPTY = ("system", "developer", "tool")
_MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "video", "video_url", "file", "input_file")


def conversation(row: Mapping[str, Any], keys: Set[str]) -> dict[str, Any] | None:
    """`messages` and `tools` of a row that is a conversation by its `keys`, None for any other; raises BadRow.

    Known are `messages` (role, content), ShareGPT's `conversations` (from, value; a `system` beside it) and `prompt`
    with `completion` as lists of messages.
    """
    if "messages" in keys:
        messages = _messages(row.get("messages"), "messages")
    elif "conversations" in keys:
        messages = _messages(row.get("conversations"), "conversations")
        if isinstance(row.get("system"), str) and row["system"].strip() and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": row["system"]})
    elif isinstance(row.get("prompt"), list) and "completion" in keys:
        messages = [*_messages(row["prompt"], "prompt"), *_messages(row.get("completion"), "completion")]
    else:
        return None
    if messages[-1]["role"] != "assistant":
        raise BadRow("the last message is not the assistant's; there is no answer to train on")
    if len(messages) < 2:
        raise BadRow("there is no message before the assistant's answer")
    return {"messages": messages, "tools": _tools(row.get("tools"))}


def answer_of(message: Mapping[str, Any]) -> str:
    """What an assistant's message says, as an evaluation compares it: its text, else its calls of tools."""
    return str(message.get("content") or json.dumps(message.get("tool_calls"), ensure_ascii=False))


def _messages(value: object, key: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{key} must be a list of messages, this is {'empty' if value == [] else kind_of(value)}")
    return [_message(message, key) for message in value]


def _message(message: object, key: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise BadRow(f"every message in {key} must be an object, this is {kind_of(message)}")
    kept = {str(name): value for name, value in message.items() if value is not None}
    role_key, content_key = ("from", "value") if "from" in kept and "role" not in kept else ("role", "content")
    role = _ROLES.get(kept[role_key]) if isinstance(kept.get(role_key), str) else None
    if role is None:
        raise BadRow(f"a message's {role_key} must be one of {', '.join(sorted(_ROLES))}")
    others = {name: value for name, value in kept.items() if name not in (role_key, content_key)}
    calls = others.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise BadRow("tool_calls must be a list of objects")
    if not calls:
        others.pop("tool_calls", None)
    elif role != "assistant":
        raise BadRow("only the assistant calls tools")
    content = _text(kept.get(content_key), content_key, role)
    if content is None:
        if calls:
            return {"role": role, **others}
        raise BadRow(f"every message needs {content_key}")
    if not content.strip() and role not in _MAY_BE_EMPTY and not calls:
        raise BadRow(f"{content_key} is empty")
    return {"role": role, "content": content, **others}


def _text(content: object, key: str, role: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{key} must be text, this is {kind_of(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind in _MEDIA:
            raise BadRow(f"a part of the {role}'s content is of the type {kind}; only text is read")
        if kind not in (None, "text", "input_text", "output_text") or not isinstance(text, str):
            raise BadRow(f"a part of the {role}'s content is not text; only parts of the type text are read")
        texts.append(text)
    return "".join(texts)


def _tools(value: object) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            raise BadRow("tools is not valid JSON") from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("tools must be a list of objects")
    return list(value)
