"""Rows that the run's chat template refuses, against real processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.federation import Federation
from tests.support.programs import BIN
from tests.support.templates import STRICT, set_template, talk
from tests.support.tiny import make_model

pytestmark = pytest.mark.e2e


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_that_the_template_refuses_are_found_before_a_site_registers_or_left_out(federation: Federation) -> None:
    federation.model = set_template(make_model(federation.folder / "strict"), STRICT)
    good = [talk("user", "assistant")] * 6
    data = written(federation.folder / "rows.jsonl", *good, talk("system", "user", "assistant"))
    held_out = written(federation.folder / "unseen.jsonl", talk("user", "user", "assistant"), *good)
    server = federation.server("--rounds=1", "--min-sites=1", "--min-evaluators=1")
    blocked = federation.client(
        "b", f"--data={written(federation.folder / 'good.jsonl', *good)}", f"--eval-data={held_out}"
    )
    assert blocked.wait() == 2
    assert f"{held_out}, line 1: the model's chat template refuses its turns (user, user, assistant)" in blocked.text
    assert "or leave such rows out with --skip-bad-rows" in blocked.text
    left = "site b left: DataError: line 1 of its data cannot be used: the model's chat template refuses its turns"
    server.wait_for(left)
    assert "the operator of the coordinator can set --prompt-format alpaca, which takes it" in server.text
    site = federation.client("a", f"--data={data}", "--skip-bad-rows", f"--eval-data={data}")
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
    assert f"{data}: 1 of 7 rows are left out (line 7: the model's chat template refuses its turns" in site.text
    report = json.loads((federation.folder / "run" / "report.json").read_text())
    assert {told["site"]: told["rows"] for told in report["sites"]} == {"a": "6", "b": "0"}
    (evaluation, *_) = report["evaluations"]
    assert int(evaluation["rows"]) == 6


def test_a_file_is_inspected_by_the_installed_command(federation: Federation) -> None:
    model = set_template(make_model(federation.folder / "strict"), STRICT)
    data = written(federation.folder / "rows.jsonl", talk("user", "assistant"), talk("system", "user", "assistant"))
    answer = subprocess.run(
        [BIN / "fedhds", "inspect-data", data, f"--model={model}"], capture_output=True, text=True, check=True
    )
    assert "1 usable: 1 chat" in answer.stdout
    assert "[[assistant 1{{</s>}}]]" in answer.stdout
