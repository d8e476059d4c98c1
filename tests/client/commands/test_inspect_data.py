"""`fedhds inspect-data`: what a site's people see of their rows before they join."""

from __future__ import annotations

import gzip
import json
import re
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
from typer.testing import CliRunner, Result

from fedhds.errors import DataError, ModelError, UsageError
from fedhds_client.commands import inspect_data as command
from fedhds_client.data.inspection import histogram
from tests.support.templates import CHAT, STRICT, set_template, talk
from tests.support.tiny import make_model

app = typer.Typer()
app.command()(command.inspect_data)

DOLLY = {"instruction": "Name a cat.", "context": "", "response": "Tom", "category": "qa"}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
WHOLE = {"prompt": "Q: why?\nA:", "completion": " because"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
TRL = {"prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "Hello."}]}
PARTS = {"messages": [{"role": role, "content": [{"type": "text", "text": "Hi."}]} for role in ("user", "assistant")]}
TASK = {"Definition": "Translate.", "Categories": ["t"], "Instances": [{"input": "cat", "output": ["chat"]}]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has no chat template; it takes 512 tokens."""
    return make_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose template takes turns only in the order user, assistant."""
    return set_template(make_model(tmp_path_factory.mktemp("strict")), STRICT)


def inspected(file: Path, model: Path, *flags: object, env: dict[str, str] | None = None) -> Result:
    words = [str(word) for word in (file, f"--model={model}", *flags)]
    result = CliRunner().invoke(app, words, env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def report(file: Path, model: Path, *flags: object) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(inspected(file, model, "--json", *flags).stdout)
    return answer


def written(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_it_shows_which_rows_are_usable_which_are_refused_and_what_is_trained(tmp_path: Path, strict: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl",
        DOLLY,
        "{",
        talk("system", "user", "assistant"),
        {"text": "x"},
        *[talk("user", "user", "assistant")] * 12,
        talk("user", "assistant", "user", "assistant"),
    )
    result = inspected(path, strict, "--rows=2")
    assert result.exit_code == 0
    text = result.stdout
    assert f"{path} in a run with {strict}: the model's chat template, rows of up to 512 tokens" in text
    assert "note: the model takes rows of up to 512 tokens, whatever --max-length says" in text
    for count, words in (
        (17, "rows"),
        (2, "usable: 1 Dolly, 1 chat"),
        (15, "refused: a site starts"),
        (0, "truncated\n"),
    ):
        assert re.search(rf"^ +{count} {words}", text, re.M), words
    refused = "the model's chat template refuses its turns"
    assert f'      12 {refused} (user, user, assistant): "roles must alternate"' in text
    assert f'line 3: {refused} (system, user, assistant): "no system role"' in text
    assert "line 2: it is not valid JSON" in text
    assert "line 4: its keys ['text'] are none of the known formats" in text
    assert text.count("\nline ") - text.count("tokens; ") == 10
    assert "--prompt-format alpaca takes 13 of them; the run's operator sets it" in text
    assert "<s>user\nName a cat.</s><s>assistant\n[[Tom{{</s>}}]]" in text
    assert "[[assistant 1{{</s>}}]]<s>user\nuser 2</s><s>assistant\n[[assistant 3{{</s>}}]]" in text
    assert re.search(r"^line 1: \d+ tokens; 4 are trained$", text, re.M)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (DOLLY, "Dolly"),
        (ALPACA, "Alpaca"),
        (WHOLE, "prompt/completion"),
        (json.loads(talk("user", "assistant")), "chat"),
        (PARTS, "chat"),
        (SHAREGPT, "ShareGPT"),
        (TRL, "conversational prompt/completion"),
        ({**ALPACA, "messages": None}, "Alpaca"),
    ],
)
@pytest.mark.parametrize("ending", ["json", "json.gz", "jsonl", "parquet"])
def test_every_format_of_rows_and_files_is_recognized(
    tmp_path: Path, plain: Path, row: dict[str, Any], form: str, ending: str
) -> None:
    path = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    else:
        text = json.dumps(row).encode()
        path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    found = report(path, plain)
    assert found["formats"] == {form: 1}
    assert (found["usable"], found["refused"], found["prompt_format"]) == (1, 0, "alpaca")
    assert found["rendered"][0]["ended"]


@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_a_task_file_is_recognized(tmp_path: Path, plain: Path, ending: str) -> None:
    text = json.dumps(TASK).encode()
    (tmp_path / f"task.{ending}").write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    assert report(tmp_path / f"task.{ending}", plain)["formats"] == {"Natural Instructions": 1}


def test_truncated_rows_are_counted_and_the_longest_length_is_marked(tmp_path: Path, plain: Path) -> None:
    rows = [{"prompt": "p" * length, "completion": "r" * 9} for length in (10, 30, 100, 200)]
    rows.append({"prompt": "p", "completion": "r" * 300})
    path = written(tmp_path / "rows.jsonl", *rows)
    found = report(path, plain, "--max-length=50", "--rows=9")
    # One token a byte, and EOS.
    lengths = [20, 40, 110, 210, 302]
    tokens = found["tokens"]
    assert (tokens["shortest"], tokens["median"], tokens["longest"], tokens["total"]) == (20, 110, 302, sum(lengths))
    assert sum(bin["rows"] for bin in tokens["histogram"]) == 5
    assert 50 in [bin["to"] for bin in tokens["histogram"]]
    assert (found["truncated"], found["cut_answers"]) == (3, 1)
    assert [row["tokens"] for row in found["rendered"]] == [20, 40, 50, 50, 50]
    assert [row["left_out"] for row in found["rendered"]] == [0, 0, 60, 160, 252]
    assert [row["ended"] for row in found["rendered"]] == [True] * 4 + [False]
    text = inspected(path, plain, "--max-length=50", "--rows=9").stdout
    assert "       3 truncated: the middle of what is before the answer is left out; 1 lose a part" in text
    bars, mark, rest = text.partition("---------------- longest row 50 ----------------")
    assert mark
    assert re.search(r"17 to 24 █+ 1$", bars, re.M)
    assert re.search(r"97 to 128 █+ 1$", rest, re.M)
    assert "no token ends the answer" in text


@pytest.mark.parametrize("lengths", [[1], [7, 8, 9], [40, 5000], [256], [257], [1, 255, 256, 257, 100_000]])
@pytest.mark.parametrize("mark", [16, 256, 300])
def test_bins_cover_all_lengths_without_gaps(lengths: list[int], mark: int) -> None:
    bins = histogram(array("Q", lengths), mark)
    assert sum(count for *_, count in bins) == len(lengths)
    for first, last, count in bins:
        assert count == sum(first <= length <= last for length in lengths)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(bins))
    assert bins[0][2]
    assert bins[-1][2]
    if min(lengths) <= mark < max(lengths):
        assert mark in [last for _, last, _ in bins]


@pytest.mark.parametrize("lines", [[], [talk("user", "user", "assistant")], ["{"]])
def test_a_file_without_a_usable_row_ends_with_1(tmp_path: Path, strict: Path, lines: list[str]) -> None:
    result = inspected(written(tmp_path / "rows.jsonl", *lines), strict)
    assert result.exit_code == 1
    assert re.search(r"^ +0 usable$", result.stdout, re.M)
    assert "Tokens in a row" not in result.stdout


def test_mistakes_end_with_2(tmp_path: Path, plain: Path) -> None:
    good = written(tmp_path / "rows.jsonl", DOLLY)
    for file, model, flags, kind in (
        (tmp_path / "none.jsonl", plain, (), DataError),
        (tmp_path, plain, (), DataError),
        (written(tmp_path / "rows.csv", DOLLY), plain, (), DataError),
        (written(tmp_path / "rows.jsonl.gz", DOLLY), plain, (), DataError),
        (good, tmp_path / "no-model", (), ModelError),
        (good, plain, ("--prompt-format=chat",), ModelError),
    ):
        with pytest.raises(kind) as caught:
            inspected(file, model, *flags)
        # The toolbox ends with 2 for these.
        assert isinstance(caught.value, UsageError)
    assert inspected(good, plain, "--max-length=3").exit_code == 2


def test_color_takes_the_place_of_marks_on_a_terminal_unless_it_is_unwanted(
    tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    path = written(tmp_path / "rows.jsonl", {"prompt": "Why?", "completion": " So."})
    colored = inspected(path, plain, env={"FORCE_COLOR": "1"}).stdout
    assert "\x1b[32m So.\x1b[0m\x1b[30;43m</s>\x1b[0m" in colored
    assert "[[" not in colored
    for env in ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, {}):
        text = inspected(path, plain, env=env).stdout
        assert "Why?[[ So.{{</s>}}]]" in text
        assert "\x1b[3" not in text


def test_text_of_rows_cannot_steer_the_terminal(tmp_path: Path, plain: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"prompt": "a\x1b[2Jb\u202ec[red]", "completion": "d\r\n\te"})
    text = inspected(path, plain).stdout
    assert "a [2Jb c[red][[d \n        e{{</s>}}]]" in text


def test_rows_0_shows_no_text(tmp_path: Path, plain: Path) -> None:
    path = written(tmp_path / "rows.jsonl", DOLLY)
    for flags in ((), ("--json",)):
        assert "Tom" not in inspected(path, plain, "--rows=0", *flags).stdout


def test_marks_in_a_rows_text_are_not_the_end_of_its_answer(tmp_path: Path, plain: Path) -> None:
    (row,) = report(written(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b</s>c"}), plain)["rendered"]
    assert [(part["text"], part["end"]) for part in row["parts"]] == [("a", False), ("b</s>c", False), ("</s>", True)]


def test_the_notes_of_a_template_are_shown_once(tmp_path: Path, plain: Path) -> None:
    template = CHAT.replace("'<s>assistant\n'", "'<s>assistant\n<think>'")
    assert template != CHAT
    model = set_template(make_model(tmp_path / "model"), template)
    (note,) = [
        note for note in report(written(tmp_path / "rows.jsonl", DOLLY), model)["notes"] if "whatever" not in note
    ]
    assert "asks for an answer with '<think>'" in note
