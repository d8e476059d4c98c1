"""The row formats that are understood, each brought into the one form that everything else works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedhds_client.data.bad_row import BadRow, kind_of
from fedhds_client.data.conversations import answer_of, conversation

_KNOWN = (
    "Dolly (instruction, context, response, category), Alpaca (instruction, input, output), prompt/completion, "
    "chat (messages), ShareGPT (conversations), Natural Instructions (Definition, Instances)"
)

_CONVERSATIONS = {"messages": "chat", "conversations": "ShareGPT", "prompt": "conversational prompt/completion"}


@dataclass(frozen=True, slots=True)
class Row:
    """One question and its answer, or a conversation; `id` is its position among the shard's accepted rows."""

    id: int
    instruction: str
    context: str
    response: str
    category: str = ""
    references: tuple[str, ...] = ()
    """Answers that count as right in an evaluation; the response is the first."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """All turns of a conversation, the last one the assistant's, whose text is `response`; `instruction` is empty."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """What the assistant of the conversation may call, as JSON schemas."""
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
            "messages": list(self.messages),
            "tools": list(self.tools),
            "verbatim": self.verbatim,
        }

    @classmethod
    def from_content(cls, number: int, content: Mapping[str, Any]) -> Row:
        """The inverse of `content`."""
        return cls(
            id=number, **{**content, **{key: tuple(content[key]) for key in ("references", "messages", "tools")}}
        )

    def as_source(self, category: str) -> dict[str, Any]:
        """The row as a line that `normalized` reads back to the same content, under `category`."""
        if self.messages:
            tools = {"tools": list(self.tools)} if self.tools else {}
            return {"messages": list(self.messages), **tools, "category": category}
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
    return recognized(row)[1]


def recognized(row: object) -> tuple[str, dict[str, Any]]:
    """The name of a row's format, for people, and its content; raises BadRow."""
    form, content = _content(row)
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON can spell it; no tokenizer and no file takes it.
        raise BadRow("it holds half a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return form, content


def _content(row: object) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, Mapping):
        raise BadRow(f"a row must be a JSON object, this is {kind_of(row)}")
    # A table that holds rows of several forms has a null where a row lacks a column.
    present = {str(key): value for key, value in row.items() if value is not None}
    # With its nulls a row may still show what it was to be, and what it lacks.
    for keys in (set(present), {str(key) for key in row}):
        if talk := conversation(present, keys):
            answer = answer_of(talk["messages"][-1])
            form = next(name for key, name in _CONVERSATIONS.items() if key in keys)
            return form, {**_described(present, "", "", answer, [answer]), **talk}
        if {"prompt", "completion"} <= keys:
            return "prompt/completion", {**_plain(present, "prompt", None, "completion"), "verbatim": True}
        if {"instruction", "output"} <= keys:
            return "Alpaca", _plain(present, "instruction", "input", "output")
        if {"instruction", "response"} <= keys:
            form = "Natural Instructions" if isinstance(row, TaskInstance) else "Dolly"
            return form, _plain(present, "instruction", "context", "response")
    raise BadRow(f"its keys {sorted(keys)} are none of the known formats: {_KNOWN}")


class TaskInstance(dict[str, Any]):
    """An instance of a Natural Instructions task, with the keys of a Dolly row."""


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
        raise BadRow(f"Instances must be a list, this is {kind_of(instances)}")
    for instance in instances:
        if not isinstance(instance, Mapping):
            yield {"instruction": instance, "response": None}
            continue
        outputs = instance.get("output")
        outputs = outputs if isinstance(outputs, list) else [outputs]
        yield TaskInstance(
            instruction=text,
            context=instance.get("input"),
            response=outputs[0] if outputs else None,
            category=category,
            references=outputs,
        )


def _plain(row: Mapping[str, Any], question: str, context: str | None, answer: str) -> dict[str, Any]:
    response = _text(row, answer)
    references = row.get("references") or [response]
    if not isinstance(references, list) or not all(isinstance(item, str) for item in references):
        raise BadRow("references must be a list of strings")
    references = [response, *(reference for reference in references if reference != response)]
    return _described(row, _text(row, question), _optional(row, context) if context else "", response, references)


def _described(
    row: Mapping[str, Any], instruction: str, context: str, response: str, references: list[str]
) -> dict[str, Any]:
    return {
        "instruction": instruction,
        "context": context,
        "response": response,
        "category": str(row.get("category", row.get("task", ""))),
        "references": references,
        "messages": [],
        "tools": [],
        "verbatim": False,
    }


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise BadRow(f"{key} must be text, this is {kind_of(value)}")
    if not value.strip():
        raise BadRow(f"{key} is empty")
    return value


def _optional(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key} must be text, this is {kind_of(value)}")
    return value
