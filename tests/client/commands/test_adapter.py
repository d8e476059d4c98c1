"""`fedhds evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fedhds.errors import DataError, ModelError, UsageError
from fedhds_client.commands.adapter import evaluate
from tests.support.tiny import write_rows

app = typer.Typer()
app.command()(evaluate)


@app.callback()
def _keeps_the_name() -> None:
    """With one command alone, typer would take no name."""


def _fedhds(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five rows."""
    return write_rows(tmp_path / "rows.jsonl", {"cats": 3, "dogs": 2})


def test_evaluate_compares_base_and_adapter(llama: Path, adapter: Path, rows: Path) -> None:
    common = ("evaluate", "--model", llama, "--data", rows, "--max-new-tokens", 4, "--batch-size", 2)
    alone = json.loads(_fedhds(*common, "--json"))
    both = json.loads(_fedhds(*common, "--adapter", adapter, "--json"))
    assert set(alone) == {"base"}
    assert both["base"] == alone["base"]
    assert both["base"]["rows"] == both["adapter"]["rows"] == 5
    assert both["adapter"]["loss"] != both["base"]["loss"]
    table = _fedhds(*common, "--adapter", adapter)
    for cell in (*both, f"{both['adapter']['loss']:.4f}", f"{both['base']['rouge_l']:.4f}"):
        assert cell in table


def test_evaluate_scores_each_category(llama: Path, tmp_path: Path) -> None:
    lines = [
        {"instruction": f"Say {number}.", "response": f"{number}"} | field
        for number, field in enumerate(({"category": "qa"}, {"task": "sum"}, {"category": "qa"}, {}, {"task": "sum"}))
    ]
    mixed, alone = tmp_path / "mixed.jsonl", tmp_path / "alone.jsonl"
    mixed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    alone.write_text("".join(json.dumps(lines[number]) + "\n" for number in (1, 4)))
    common = ("evaluate", "--model", llama, "--max-new-tokens", 4)
    base = json.loads(_fedhds(*common, "--data", mixed, "--json"))["base"]
    assert {name: scores["rows"] for name, scores in base["categories"].items()} == {"none": 1, "qa": 2, "sum": 2}
    own = json.loads(_fedhds(*common, "--data", alone, "--json"))["base"]
    assert own["categories"]["sum"] == {name: value for name, value in own.items() if name != "categories"}
    assert base["categories"]["sum"] == pytest.approx(own["categories"]["sum"], rel=1e-4)
    assert base["rouge_l"] == pytest.approx(
        sum(scores["rouge_l"] * scores["rows"] for scores in base["categories"].values()) / 5
    )
    table = _fedhds(*common, "--data", mixed)
    assert [line.split()[1] for line in table.splitlines() if " base " in line] == ["none", "qa", "sum", "all"]


def test_bad_input_is_a_persons_mistake(llama: Path, adapter: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks"):
        _fedhds("evaluate", "--model", llama, "--data", rows, "--adapter", rows)
    with pytest.raises(DataError, match="no such file"):
        _fedhds("evaluate", "--model", llama, "--data", tmp_path / "absent.jsonl")
    with pytest.raises(ModelError, match="no model folder"):
        _fedhds("evaluate", "--model", tmp_path / "absent", "--data", rows)
    with pytest.raises(ModelError, match="is an adapter; give the base model"):
        _fedhds("evaluate", "--model", adapter, "--data", rows)


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fedhds_client.commands.adapter; "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
