"""The row formats that are understood, each brought into the one form that everything else works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_KNOWN = (
    "Dolly (instruction, context, response, category), Alpaca (instruction, input, output), prompt/completion, "
    "chat (messages), Natural Instructions (Definition, Instances)"
)


class BadRow(ValueError):
    """A row that cannot be used; the text names keys and types, never values: it may end up in a log."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer; `id` is its position among the shard's accepted rows."""

    id: int
    instruction: str
    context: str
    response: str
    category: str = ""
    references: tuple[str, ...] = ()
    """Answers that count as right in an evaluation; the response is the first."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns of a chat as (role, content); the last user turn is `instruction`."""
    verbatim: bool = False
    """The instruction is a whole prompt and goes in without a template."""

    def content(self) -> dict[str, Any]:
        """All but the id, as JSON keeps it."""
        return {
            "instruction": self.instruction,
            "context": self.context,
            "response": self.response,
            "category": self.category,
            "references": list(self.references),
            "history": [list(turn) for turn in self.history],
            "verbatim": self.verbatim,
        }

    @classmethod
    def from_content(cls, number: int, content: Mapping[str, Any]) -> Row:
        """The inverse of `content`."""
        return cls(
            id=number,
            **{
                **content,
                "references": tuple(content["references"]),
                "history": tuple((role, text) for role, text in content["history"]),
            },
        )

    def as_source(self, category: str) -> dict[str, Any]:
        """The row as a line that `normalized` reads back to the same content, under `category`."""
        if self.history:
            turns = [*self.history, ("user", self.instruction), ("assistant", self.response)]
            return {"messages": [{"role": role, "content": text} for role, text in turns], "category": category}
        row: dict[str, Any] = (
            {"prompt": self.instruction, "completion": self.response}
            if self.verbatim
            else {"instruction": self.instruction, "context": self.context, "response": self.response}
        )
        row["category"] = category
        return row | ({"references": list(self.references)} if len(self.references) > 1 else {})

    @property
    def digest(self) -> str:
        """SHA-256 of the content: equal rows have equal digests, wherever they stand."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def normalized(row: object) -> dict[str, Any]:
    """The content of one row of any known format; raises BadRow."""
    content = _content(row)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can spell it; no tokenizer and no file takes it.
        raise BadRow("it holds half a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return content


def _content(row: object) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise BadRow(f"a row must be a JSON object, this is {_kind(row)}")
    keys = set(row)
    if "messages" in keys:
        return _chat(row)
    if {"prompt", "completion"} <= keys:
        content = _plain(row, "prompt", None, "completion")
        return content | {"verbatim": True}
    if {"instruction", "output"} <= keys:
        return _plain(row, "instruction", "input", "output")
    if {"instruction", "response"} <= keys:
        return _plain(row, "instruction", "context", "response")
    raise BadRow(f"its keys {sorted(map(str, keys))} are none of the known formats: {_KNOWN}")


def is_task_file(document: object) -> bool:
    """Whether a JSON document is a Natural Instructions task."""
    return isinstance(document, Mapping) and {"Definition", "Instances"} <= set(document)


def task_rows(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of a Natural Instructions task: the definition is the instruction, every output a right answer."""
    definition = document["Definition"]
    text = "\n".join(map(str, definition)) if isinstance(definition, list) else definition
    categories = document.get("Categories") or [""]
    category = categories[0] if isinstance(categories, list) else categories
    instances = document["Instances"]
    if not isinstance(instances, list):
        raise BadRow(f"Instances must be a list, this is {_kind(instances)}")
    for instance in instances:
        if not isinstance(instance, Mapping):
            yield {"instruction": instance, "response": None}
            continue
        outputs = instance.get("output")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        yield {
            "instruction": text,
            "context": instance.get("input"),
            "response": outputs[0] if outputs else None,
            "category": category,
            "references": outputs,
        }


def _plain(row: Mapping[Any, Any], question: str, context: str | None, answer: str) -> dict[str, Any]:
    response = _text(row, answer)
    references = row.get("references") or [response]
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise BadRow("references must be a list of strings")
    category = row.get("category")
    return {
        "instruction": _text(row, question),
        "context": _optional(row, context) if context else "",
        "response": response,
        "category": "" if category is None else str(category),
        "references": [response, *(reference for reference in references if reference != response)],
        "history": [],
        "verbatim": False,
    }


def _chat(row: Mapping[Any, Any]) -> dict[str, Any]:
    messages = row["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise BadRow("messages must be a list of at least two turns")
    turns: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadRow("every message needs a role and a content")
        role = message["role"]
        if role not in ("system", "user", "assistant"):
            raise BadRow("a message's role must be system, user or assistant")
        turns.append((role, _text(message, "content")))
    if turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise BadRow("the last message must be the assistant's, and the one before it the user's")
    category = row.get("category")
    return {
        "instruction": turns[-2][1],
        "context": "",
        "response": turns[-1][1],
        "category": "" if category is None else str(category),
        "references": [turns[-1][1]],
        "history": [list(turn) for turn in turns[:-2]],
        "verbatim": False,
    }


def _text(row: Mapping[Any, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key} must be text, this is {_kind(value)}")
    if not value.strip():
        raise BadRow(f"{key} is empty")
    return value


def _optional(row: Mapping[Any, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key} must be text, this is {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {
        type(None): "missing",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)
