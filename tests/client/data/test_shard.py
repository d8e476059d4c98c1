"""Shards: every row format from every kind of file, bad rows named or counted, and the same rows read back."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedhds.errors import DataError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.row_formats import Row, normalized, task_rows
from fedhds_client.data.shard import Shard
from tests.support.shared import shared

DOLLY = {"instruction": "Name a cat.", "context": "Tom is a cat.", "response": "Tom", "category": "qa"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
COMPLETION = {"prompt": "Q: why?\nA:", "completion": " because"}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye?"},
        {"role": "assistant", "content": "Bye!"},
    ]
}
FORMATS: dict[str, tuple[dict[str, Any], Row]] = {
    "Dolly": (DOLLY, Row(0, "Name a cat.", "Tom is a cat.", "Tom", "qa", ("Tom",))),
    "Alpaca": (ALPACA, Row(0, "Add.", "1 and 2", "3", "", ("3",))),
    "prompt/completion": (COMPLETION, Row(0, "Q: why?\nA:", "", " because", "", (" because",), (), (), True)),
    "chat": (
        CHAT,
        Row(0, "", "", "Bye!", "", ("Bye!",), tuple(CHAT["messages"])),
    ),
}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": "3"},
        ]
    },
    "ShareGPT": {
        "id": "7",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Add."},
            {"from": "gpt", "value": "3"},
        ],
    },
    "ShareGPT with a system column": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "Add."}, {"from": "gpt", "value": "3"}],
    },
    "conversations with roles": {
        "conversations": [
            {"role": "system", "content": "Be brief."},
            {"role": "human", "content": "Add."},
            {"role": "model", "content": "3"},
        ],
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Ad"}, {"type": "text", "text": "d."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        ]
    },
    "prompt/completion": {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add."}],
        "completion": [{"role": "assistant", "content": "3"}],
    },
}
TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Does it rain?"},
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Brno"}}}],
        },
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "assistant", "content": "It rains."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
            },
        }
    ],
}
TASK: dict[str, Any] = {
    "Definition": ["Translate to French.", "Answer with one word."],
    "Categories": ["Translation", "Other"],
    "Instances": [
        {"id": "a", "input": "cat", "output": ["chat", "matou"]},
        {"id": "b", "input": "dog", "output": "chien"},
    ],
}
TASK_ROWS = [
    Row(0, "Translate to French.\nAnswer with one word.", "cat", "chat", "Translation", ("chat", "matou")),
    Row(1, "Translate to French.\nAnswer with one word.", "dog", "chien", "Translation", ("chien",)),
]


def _lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _parquet(path: Path, rows: list[Any]) -> None:
    columns = dict.fromkeys(key for row in rows for key in row)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]), path)


WRITERS: dict[str, Callable[[Path, list[Any]], object]] = {
    "rows.jsonl": lambda path, rows: path.write_bytes(_lines(rows)),
    "rows.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(_lines(rows))),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows, indent=2), encoding="utf-8"),
    "rows.json.gz": lambda path, rows: path.write_bytes(gzip.compress(json.dumps(rows).encode())),
    "rows.parquet": _parquet,
    "ROWS.JSONL": lambda path, rows: path.write_bytes(_lines(rows)),
    # Many files of JSON lines are called .json.
    "lines.json": lambda path, rows: path.write_bytes(_lines(rows)),
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _rows(path: Path, **options: Any) -> list[Row]:
    with Shard.open(path, **options) as shard:
        return list(shard)


def _fault(path: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        Shard.open(path, **options)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value


# What is understood.


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_from_every_kind_of_file(tmp_path: Path, form: str, file: str) -> None:
    row, expected = FORMATS[form]
    WRITERS[file](tmp_path / file, [row, row, row])
    rows = _rows(tmp_path / file)
    assert [row.id for row in rows] == [0, 1, 2]
    assert [row.content() for row in rows] == [expected.content()] * 3


@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("form", CONVERSATIONS)
def test_every_form_of_a_conversation_gives_the_same_messages(tmp_path: Path, form: str, file: str) -> None:
    source = CONVERSATIONS[form]
    WRITERS[file](tmp_path / file, [source, DOLLY])
    talk, plain = _rows(tmp_path / file)
    assert list(talk.messages) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "3"},
    ]
    assert (talk.instruction, talk.response, talk.references, talk.verbatim) == ("", "3", ("3",), False)
    assert plain.content() == FORMATS["Dolly"][1].content()


@pytest.mark.parametrize("file", WRITERS)
def test_calls_of_tools_and_what_they_return_are_kept(tmp_path: Path, file: str) -> None:
    WRITERS[file](tmp_path / file, [TOOLS, ALPACA])
    row = _rows(tmp_path / file)[0]
    assert list(row.messages) == TOOLS["messages"]
    assert list(row.tools) == TOOLS["tools"]
    assert row.response == "It rains."
    content = normalized(TOOLS | {"tools": json.dumps(TOOLS["tools"])})
    assert content == row.content()
    ends_in_call = normalized({"messages": TOOLS["messages"][:2], "tools": TOOLS["tools"]})
    assert json.loads(ends_in_call["response"]) == TOOLS["messages"][1]["tool_calls"]


def test_a_null_stands_for_a_key_that_is_absent() -> None:
    nothing = dict.fromkeys(("messages", "conversations", "tools", "prompt", "completion", "category", "references"))
    assert normalized(nothing | ALPACA) == normalized(ALPACA)
    assert normalized(nothing | {"instruction": None, "output": None} | CHAT) == normalized(CHAT)
    nulls = [turn | {"name": None, "tool_calls": None} for turn in CHAT["messages"]]
    assert normalized({"messages": nulls}) == normalized(CHAT)


@pytest.mark.parametrize(
    ("case", "turns"),
    [
        ("union.jsonl", [0, 2]),
        ("sharegpt.json", [2]),
        ("content-parts.jsonl", [2]),
        ("trl-conversational.jsonl", [2]),
        ("tool-role.jsonl", [4]),
        ("multi.jsonl", [4]),
        ("two-users.jsonl", [3]),
        ("assistant-first.jsonl", [3]),
    ],
)
def test_the_shared_cases_are_read(case: str, turns: list[int]) -> None:
    assert [len(row.messages) for row in _rows(shared("cases") / case)] == turns


def test_a_document_of_a_single_row_is_a_shard_of_one(tmp_path: Path) -> None:
    path = _written(tmp_path / "row.json", json.dumps(DOLLY, indent=2).encode())
    assert _rows(path) == [FORMATS["Dolly"][1]]


@pytest.mark.parametrize("file", ["task001.json", "task001.json.gz"])
def test_a_natural_instructions_task_gives_a_row_per_instance(tmp_path: Path, file: str) -> None:
    content = json.dumps(TASK, indent=1).encode()
    path = _written(tmp_path / file, gzip.compress(content) if file.endswith(".gz") else content)
    assert _rows(path) == TASK_ROWS


@pytest.mark.parametrize(
    ("categories", "read"),
    [({}, ""), ({"Categories": []}, ""), ({"Categories": "QA"}, "QA"), ({"Categories": None}, "")],
)
def test_a_task_may_name_its_category_in_several_ways(categories: dict[str, Any], read: str) -> None:
    document = {"Definition": "Do.", "Instances": [{"input": "this", "output": ["done"]}]} | categories
    (row,) = task_rows(document)
    assert normalized(row)["instruction"] == "Do."
    assert normalized(row)["category"] == read


def test_formats_may_be_mixed_and_rows_may_carry_more_than_is_needed(tmp_path: Path) -> None:
    rows = [row | {"id": 7, "notes": None} for row, _ in FORMATS.values()]
    path = _written(tmp_path / "rows.jsonl", _lines(rows))
    assert [row.content() for row in _rows(path)] == [expected.content() for _, expected in FORMATS.values()]


@pytest.mark.parametrize("context", [{}, {"context": None}, {"context": ""}])
def test_a_context_may_be_absent(context: dict[str, Any]) -> None:
    assert normalized({"instruction": "a", "response": "b"} | context)["context"] == ""


@pytest.mark.parametrize(("category", "read"), [(None, ""), ("qa", "qa"), (3, "3")])
def test_a_category_may_be_null_or_a_number(category: object, read: str) -> None:
    for row, _ in FORMATS.values():
        assert normalized(row | {"category": category})["category"] == read


def test_the_response_is_the_first_of_the_right_answers() -> None:
    assert normalized(DOLLY | {"references": ["Felix", "Tom", "Garfield"]})["references"] == [
        "Tom",
        "Felix",
        "Garfield",
    ]
    assert normalized(DOLLY | {"references": ["Felix"]})["references"] == ["Tom", "Felix"]
    assert normalized(DOLLY | {"references": None})["references"] == ["Tom"]


def test_a_byte_order_mark_carriage_returns_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    plain = _written(tmp_path / "plain.jsonl", _lines([DOLLY, ALPACA]))
    dos = _written(
        tmp_path / "dos.jsonl",
        b"\xef\xbb\xbf" + b"\r\n\r\n  \r\n".join(json.dumps(row).encode() for row in (DOLLY, ALPACA)),
    )
    assert _rows(dos) == _rows(plain)
    fault = _fault(_written(tmp_path / "dos.jsonl", dos.read_bytes() + b"\r\n\t\r\n{}\r\n"))
    assert fault.line == 6
    document = _written(tmp_path / "rows.json", b"\xef\xbb\xbf\r\n" + json.dumps([DOLLY, ALPACA]).encode())
    assert _rows(document) == _rows(plain)


def test_text_keeps_every_character(tmp_path: Path) -> None:
    text = ' \tKätzchen 🐈 \u2028 "\\n" \x00\r\n end '
    rows = [{"instruction": text, "context": text, "response": text}]
    for file in ("rows.jsonl", "rows.json", "rows.parquet"):
        WRITERS[file](tmp_path / file, rows)
        (row,) = _rows(tmp_path / file)
        assert (row.instruction, row.context, row.response) == (text, text, text)


# What is not.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a", "b"], "a row must be a JSON object, this is a list"),
        ("text", "a row must be a JSON object, this is text"),
        (None, "a row must be a JSON object, this is missing"),
        (True, "a row must be a JSON object, this is a boolean"),
        ({}, "none of the known formats"),
        ({"question": "a", "answer": "b"}, r"its keys \['answer', 'question'\] are none of the known formats: Dolly"),
        ({"instruction": "a"}, "none of the known formats"),
        ({"prompt": "a"}, "none of the known formats"),
        (DOLLY | {"response": None}, "response must be text, this is missing"),
        (DOLLY | {"response": 3}, "response must be text, this is a number"),
        (DOLLY | {"response": 0.5}, "response must be text, this is a number"),
        (DOLLY | {"response": " \n"}, "response is empty"),
        (DOLLY | {"instruction": {}}, "instruction must be text, this is an object"),
        (DOLLY | {"instruction": ""}, "instruction is empty"),
        (DOLLY | {"context": ["a"]}, "context must be text, this is a list"),
        (DOLLY | {"references": "Tom"}, "references must be a list of strings"),
        (DOLLY | {"references": ["Tom", None]}, "references must be a list of strings"),
        (ALPACA | {"input": False}, "input must be text, this is a boolean"),
        (ALPACA | {"output": None}, "output must be text, this is missing"),
        (COMPLETION | {"completion": []}, "completion must be text, this is a list"),
        (COMPLETION | {"prompt": None}, "prompt must be text, this is missing"),
        ({"messages": None}, "messages must be a list of messages, this is missing"),
        ({"messages": []}, "messages must be a list of messages, this is empty"),
        ({"messages": CHAT["messages"][1:2]}, "the last message is not the assistant's"),
        ({"messages": CHAT["messages"][:4]}, "the last message is not the assistant's"),
        ({"messages": CHAT["messages"][2:3]}, "no message before the assistant's answer"),
        ({"messages": ["Hi.", "Hello."]}, "every message in messages must be an object, this is text"),
        ({"messages": [{"role": "user"}, *CHAT["messages"][2:3]]}, "every message needs content"),
        ({"messages": [{"role": "user", "content": " "}, *CHAT["messages"][2:3]]}, "content is empty"),
        ({"messages": [{"role": "asistant", "content": "a"}, *CHAT["messages"][2:3]]}, "role must be one of assistant"),
        ({"messages": [{"role": ["user"], "content": "a"}, *CHAT["messages"][2:3]]}, "role must be one of assistant"),
        ({"messages": [*CHAT["messages"][1:2], {"role": "assistant", "content": None}]}, "every message needs content"),
        (
            {"messages": [{"role": "user", "content": 7}, *CHAT["messages"][2:3]]},
            "content must be text, this is a number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, CHAT["messages"][2]]},
            "a part of the user's content is of the type image_url; only text is read",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT["messages"][2]]},
            "a part of the user's content is not text",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}, CHAT["messages"][2]]},
            "only the assistant calls tools",
        ),
        ({"messages": CHAT["messages"], "tools": "[{"}, "tools is not valid JSON"),
        ({"messages": CHAT["messages"], "tools": ["f"]}, "tools must be a list of objects"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "the last message is not the assistant's"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "a message's from must be one of"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "completion must be a list of messages"),
        (DOLLY | {"response": "\ud83d"}, "half a surrogate pair"),
        (DOLLY | {"category": "\udc00"}, "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_line_and_reason(tmp_path: Path, row: object, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        normalized(row)
    content = b"".join(json.dumps(line).encode() + b"\n" for line in (DOLLY, row, DOLLY))
    fault = _fault(_written(tmp_path / "rows.jsonl", content))
    assert fault.line == 2
    assert f"{tmp_path / 'rows.jsonl'}, line 2: " in str(fault)
    assert "--skip-bad-rows" in str(fault)
    with pytest.raises(DataError, match=reason):
        Shard.open(tmp_path / "rows.jsonl")
    fault = _fault(_written(tmp_path / "rows.json", json.dumps([DOLLY, DOLLY, row]).encode()))
    assert fault.line == 3


def test_the_reason_gives_no_text_of_a_row_away(tmp_path: Path) -> None:
    secret = "Mr Smith"
    for row in (
        DOLLY | {"instruction": secret, "response": [secret]},
        {"messages": [{"role": secret, "content": secret}, {"role": "assistant", "content": secret}]},
        [secret],
        secret,
        {"instruction": {secret: secret}, "output": secret},
    ):
        fault = _fault(_written(tmp_path / "rows.jsonl", json.dumps(row).encode()))
        assert secret not in str(fault)
    fault = _fault(_written(tmp_path / "rows.jsonl", b'{"instruction": "Mr Smith'))
    assert secret not in str(fault)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "a"', "it is not valid JSON"),
        (b"{'instruction': 'a'}", "it is not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"instruction": ' + b"1" * 5000 + b"}", "too many digits"),
        (json.dumps(DOLLY).replace("Tom", "Zürich").encode("latin-1"), "not valid UTF-8"),
        ("\ufeff".encode() + json.dumps(DOLLY).encode(), "it is not valid JSON"),
    ],
)
def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path, line: bytes, reason: str) -> None:
    path = _written(tmp_path / "rows.jsonl", _lines([DOLLY]) + line + b"\n" + _lines([ALPACA]))
    fault = _fault(path)
    assert (fault.line, reason in fault.reason) == (2, True)
    with Shard.open(path, skip_bad_rows=True) as shard:
        assert [row.response for row in shard] == ["Tom", "3"]
        assert shard.skipped == 1


def test_a_utf16_file_is_not_mistaken_for_text(tmp_path: Path) -> None:
    fault = _fault(_written(tmp_path / "rows.jsonl", json.dumps(DOLLY).encode("utf-16")))
    assert (fault.line, "not valid UTF-8" in fault.reason) == (1, True)


def test_skipped_rows_are_counted_and_the_first_ones_explained(tmp_path: Path) -> None:
    lines = _lines([DOLLY if number % 3 == 0 else {"bad": number} for number in range(30)])
    path = _written(tmp_path / "rows.jsonl", lines)
    with Shard.open(path, skip_bad_rows=True) as shard:
        assert len(shard) == 10
        assert [row.id for row in shard] == list(range(10))
        assert shard.skipped == 20
        assert [line for line, _ in shard.skipped_reasons] == [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]
        assert all("known formats" in reason for _, reason in shard.skipped_reasons)
        assert shard.categories == {"qa": 10}
    with Shard.open(_written(path, _lines([DOLLY] * 10)), skip_bad_rows=True) as clean:
        assert (clean.skipped, clean.skipped_reasons) == (0, [])
        assert clean.digest == shard.digest


def test_rows_that_a_check_refuses_leave_the_shard_of_the_others(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{**DOLLY, "response": f"Tom {number}" * (number + 1)} for number in range(30)]
    refused = [number for number in range(30) if number % 3]
    lines = [b"", b"{}", *(json.dumps(row).encode() for row in rows)]
    shares: list[float] = []

    def check(row: Row) -> None:
        if any(row.response == rows[number]["response"] for number in refused):
            raise BadRow("the template does not take it")

    with Shard.open(_written(tmp_path / "rows.jsonl", b"\n".join(lines)), skip_bad_rows=True) as shard:
        digest = shard.digest
        count, first = shard.leave_out(check, shares.append)
        assert (count, len(shard), shard.skipped) == (20, 10, 21)
        # An empty line is no row, but a line.
        assert first == [(number + 3, "the template does not take it") for number in refused[:10]]
        assert shard.skipped_reasons[0][0] == 2
        assert shard.skipped_reasons[1:] == first[:9]
        assert [(row.id, row.response) for row in shard] == [(i, rows[3 * i]["response"]) for i in range(10)]
        assert shard.categories == {"qa": 10}
        assert (len(shares), shares[-1]) == (30, 1.0)
        # What remains is judged again to the same end.
        assert shard.leave_out(check) == (0, [])
        kept = [row for number, row in enumerate(rows) if number not in refused]
        with Shard.open(_written(tmp_path / "kept.jsonl", _lines(kept))) as other:
            assert other.digest == shard.digest != digest
        assert shard.leave_out(lambda row: check(Row(0, "", "", rows[1]["response"])))[0] == 10
        assert len(shard) == 0


def test_bad_instances_of_a_task_are_named_or_skipped(tmp_path: Path) -> None:
    instances = [*TASK["Instances"], "text", {"input": "x", "output": []}, {"input": 3, "output": "y"}, {"output": "z"}]
    path = _written(tmp_path / "task.json", json.dumps(TASK | {"Instances": instances}).encode())
    assert _fault(path).line == 3
    with Shard.open(path, skip_bad_rows=True) as shard:
        assert [row.response for row in shard] == ["chat", "chien", "z"]
        assert [line for line, _ in shard.skipped_reasons] == [3, 4, 5]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"Instances": {}}, "Instances must be a list, this is an object"),
        ({"Instances": None}, "Instances must be a list, this is missing"),
        ({"Instances": []}, "at least one row"),
        ({"Definition": None}, "instruction must be text, this is missing"),
        ({"Definition": []}, "instruction is empty"),
    ],
)
def test_a_task_without_instances_or_definition_is_an_error(tmp_path: Path, task: dict[str, Any], reason: str) -> None:
    fault = _fault(_written(tmp_path / "task.json", json.dumps(TASK | task).encode()))
    assert reason in str(fault)


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("skip", [True, False])
def test_an_empty_shard_is_an_error(tmp_path: Path, file: str, content: bytes, skip: bool) -> None:
    path = _written(tmp_path / file, gzip.compress(content) if file.endswith(".gz") else content)
    assert "the file is empty" in str(_fault(path, skip_bad_rows=skip))


def test_an_empty_list_or_table_is_an_empty_shard_too(tmp_path: Path) -> None:
    assert "the file is empty" in str(_fault(_written(tmp_path / "rows.json", b"[]")))
    table = pyarrow.table({"instruction": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert "the file is empty" in str(_fault(tmp_path / "rows.parquet"))


def test_a_shard_whose_rows_are_all_bad_is_an_error_also_when_bad_rows_are_skipped(tmp_path: Path) -> None:
    fault = _fault(_written(tmp_path / "rows.jsonl", b"{}\n[]\n"), skip_bad_rows=True)
    assert "none of its 2 rows can be used; the first: its keys []" in str(fault)


@pytest.mark.parametrize("skip", [True, False])
def test_a_truncated_gzip_file_is_an_error_even_when_bad_rows_are_skipped(tmp_path: Path, skip: bool) -> None:
    # Random text does not compress: half of the file holds about half of the rows.
    rng = np.random.default_rng(0)
    rows = [DOLLY | {"response": rng.bytes(200).hex()} for _ in range(100)]
    whole = gzip.compress(_lines(rows))
    fault = _fault(_written(tmp_path / "rows.jsonl.gz", whole[: len(whole) // 2]), skip_bad_rows=skip)
    assert "cut short or damaged" in fault.reason
    assert fault.line is not None
    assert 30 < fault.line < 70
    fault = _fault(_written(tmp_path / "rows.json.gz", whole[: len(whole) // 2]), skip_bad_rows=skip)
    assert "cut short or damaged" in fault.reason


@pytest.mark.parametrize("file", ["rows.jsonl.gz", "rows.json.gz"])
def test_a_damaged_or_uncompressed_gzip_file_is_an_error(tmp_path: Path, file: str) -> None:
    whole = bytearray(gzip.compress(_lines([DOLLY] * 50)))
    whole[-8] ^= 0xFF  # the checksum
    assert "cut short or damaged" in str(_fault(_written(tmp_path / file, bytes(whole))))
    whole[20:25] = b"\xff" * 5
    assert "cut short or damaged" in str(_fault(_written(tmp_path / file, bytes(whole))))
    assert "cut short or damaged" in str(_fault(_written(tmp_path / file, _lines([DOLLY]))))


def test_a_damaged_document_is_an_error_even_when_bad_rows_are_skipped(tmp_path: Path) -> None:
    path = _written(tmp_path / "rows.json", json.dumps([DOLLY] * 3)[:-5].encode())
    assert "it is not valid JSON" in str(_fault(path, skip_bad_rows=True))
    assert "not valid UTF-8" in str(_fault(_written(path, b'["\xff"]'), skip_bad_rows=True))


def test_a_bad_line_of_lines_called_json_is_named(tmp_path: Path) -> None:
    path = _written(tmp_path / "rows.json", _lines([DOLLY]) + b"{oops}\n" + _lines([DOLLY]))
    assert _fault(path).line == 2


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _parquet(path, [DOLLY] * 5000)
    whole = path.read_bytes()
    for content in (b"", b"PAR1", _lines([DOLLY]), whole[: len(whole) // 2]):
        assert "is not a readable Parquet file" in str(_fault(_written(path, content), skip_bad_rows=True))
    assert "read" in _fault(_written(path, whole[:20] + bytes(200) + whole[220:])).reason


def test_only_the_parquet_rows_that_are_no_utf8_are_bad(tmp_path: Path) -> None:
    texts = [b"one", b"tw\xff", b"three"]
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
    buffers = [None, pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(b"".join(texts))]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["a", "b", "c"], "response": column}), path)
    fault = _fault(path)
    assert (fault.line, "not valid UTF-8" in fault.reason) == (2, True)
    with Shard.open(path, skip_bad_rows=True) as shard:
        assert [row.response for row in shard] == ["one", "three"]


def test_null_columns_of_a_parquet_file_are_bad_rows_where_text_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    _parquet(path, [DOLLY | {"context": None, "category": None}, DOLLY | {"response": None}])
    assert _fault(path).line == 2
    (row,) = _rows(path, skip_bad_rows=True)
    assert (row.context, row.category) == ("", "")


@pytest.mark.parametrize("file", ["rows.csv", "rows", "rows.gz", "rows.jsonl.zst"])
def test_an_unknown_ending_is_an_error_that_lists_the_known_ones(tmp_path: Path, file: str) -> None:
    fault = _fault(_written(tmp_path / file, _lines([DOLLY])))
    assert "known are .jsonl, .jsonl.gz, .json, .json.gz, .parquet" in str(fault)


def test_a_file_that_is_absent_or_a_folder_is_an_error(tmp_path: Path) -> None:
    assert "there is no such file" in str(_fault(tmp_path / "absent.jsonl"))
    assert "is a folder" in str(_fault(tmp_path))
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder" in str(_fault(tmp_path / "folder.jsonl"))


# A shard as it is used.


def test_rows_are_numbered_and_nothing_lies_beyond_them(tmp_path: Path) -> None:
    rows = [DOLLY | {"response": str(number)} for number in range(3)]
    with Shard.open(_written(tmp_path / "rows.jsonl", _lines(rows))) as shard:
        assert [shard[number].response for number in (2, 0, 1)] == ["2", "0", "1"]
        for number in (-1, 3):
            with pytest.raises(IndexError, match="of 3"):
                shard[number]


def test_a_shard_outlives_its_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    path = _written(tmp_path / "rows.jsonl", _lines([DOLLY]))
    with Shard.open(path, spool_dir=spool) as shard:
        path.write_bytes(_lines([ALPACA]))
        assert shard[0].response == "Tom"
        assert not list(spool.iterdir())


def test_rows_can_be_read_from_several_threads(tmp_path: Path) -> None:
    rows = [DOLLY | {"response": f"{number} " * number} for number in range(1, 200)]
    path = _written(tmp_path / "rows.jsonl", _lines(rows))
    with Shard.open(path) as shard, ThreadPoolExecutor(8) as pool:
        numbers = np.random.default_rng(0).integers(0, len(shard), 2000).tolist()
        read = pool.map(lambda number: shard[number].response, numbers)
        assert list(read) == [rows[number]["response"] for number in numbers]


def test_the_digest_is_that_of_the_rows_in_their_order(tmp_path: Path) -> None:
    def digest(file: str, rows: list[Any]) -> str:
        WRITERS[file](tmp_path / file, rows)
        with Shard.open(tmp_path / file) as shard:
            return shard.digest

    other = DOLLY | {"response": "Felix"}
    one = digest("rows.jsonl", [DOLLY, other])
    assert len(one) == 64
    assert {digest(file, [DOLLY, other]) for file in WRITERS} == {one}
    assert len({one, digest("rows.jsonl", [other, DOLLY]), digest("rows.jsonl", [DOLLY])}) == 3


def test_a_rows_digest_depends_on_its_content_alone() -> None:
    row = FORMATS["Dolly"][1]
    again = Row.from_content(99, row.content())
    assert (again.digest, again.id) == (row.digest, 99)
    changed = {
        "instruction": "x",
        "context": "x",
        "response": "x",
        "category": "x",
        "references": ["x"],
        "messages": [{"role": "assistant", "content": "x"}],
        "tools": [{"type": "function"}],
        "verbatim": True,
    }
    assert set(changed) == set(row.content())
    digests = {Row.from_content(0, row.content() | {key: value}).digest for key, value in changed.items()}
    assert len(digests | {row.digest}) == 9


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SAID = TEXT.filter(lambda text: bool(text.strip()))
EXTRAS = st.fixed_dictionaries({}, optional={"category": TEXT, "references": st.lists(TEXT, max_size=3)})
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]), "content": SAID},
        optional={"name": TEXT},
    ),
    min_size=1,
    max_size=4,
)
SOURCES: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda row, more: row | more,
    st.one_of(
        st.fixed_dictionaries({"instruction": SAID, "response": SAID}, optional={"context": TEXT}),
        st.fixed_dictionaries({"instruction": SAID, "output": SAID}, optional={"input": TEXT}),
        st.fixed_dictionaries({"prompt": SAID, "completion": SAID}),
        st.builds(
            lambda turns, answer, tools: {
                "messages": [*turns, {"role": "assistant", "content": answer}],
                **({"tools": tools} if tools else {}),
            },
            TURNS,
            SAID,
            st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(TEXT, TEXT)})),
        ),
    ),
    EXTRAS,
)


@given(SOURCES)
def test_a_row_written_as_a_source_is_read_back_the_same(source: dict[str, Any]) -> None:
    content = normalized(source)
    row = Row.from_content(0, content)
    assert row.content() == content
    assert row.references[0] == row.response
    assert normalized(row.as_source(row.category)) == content
    assert normalized(row.as_source("another")) == content | {"category": "another"}


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SOURCES, min_size=1, max_size=5), st.sampled_from(["rows.jsonl", "rows.jsonl.gz", "rows.json"]))
def test_rows_come_back_from_a_shard_as_they_were_written(
    tmp_path: Path, sources: list[dict[str, Any]], file: str
) -> None:
    WRITERS[file](tmp_path / file, sources)
    with Shard.open(tmp_path / file) as shard:
        rows = list(shard)
        assert [row.content() for row in rows] == [normalized(source) for source in sources]
        assert shard.categories == Counter(row.category for row in rows)
        assert shard.digest
    _written(tmp_path / "again.jsonl", _lines([row.as_source(row.category) for row in rows]))
    assert _rows(tmp_path / "again.jsonl") == rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_data_error_and_nothing_else(tmp_path: Path, content: bytes) -> None:
    for file in ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz", "rows.parquet"):
        with pytest.raises(DataError):
            Shard.open(_written(tmp_path / file, content), skip_bad_rows=True)


@pytest.mark.slow
def test_the_real_dolly_rows_are_all_read() -> None:
    (path,) = shared("data/dolly").glob("*.jsonl.gz")
    with Shard.open(path) as shard:
        assert len(shard) == 14_996
        assert len(shard.categories) == 8
        assert shard.categories["summarization"] > 1000
        assert shard[0].category == "summarization"
        assert len({row.digest for row in shard}) == len(shard)
