"""Lines of finished runs, and the table and the plot that are made of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedhds.errors import StorageError
from fedhds_server.simulation.results import RunLines, groups_of, interval, last_values, plot, table_of


def line(strategy: str, seed: int, *losses: float) -> dict[str, Any]:
    evaluations = {str(number): {"loss": loss, "rouge_l": 1 / loss} for number, loss in enumerate(losses)}
    return {
        "settings": {"selection_strategy": strategy, "seed": str(seed)},
        "result": {"trained_rows": 10 * seed, "pool_rows": 99, "evaluations": {"unseen": evaluations}},
        "measured": {"seconds": 5.0, "bytes_received": 2_000_000},
    }


LINES = [line("random", 1, 4, 3, 2), line("random", 2, 4, 3, 1), line("fedhds", 1, 4, 3, 1)]


def test_lines_are_kept_and_a_line_that_a_crash_cut_short_is_not(tmp_path: Path) -> None:
    path = tmp_path / "out" / "runs.jsonl"
    runs = RunLines(path)
    for index, entry in enumerate(LINES):
        runs.add(f"key {index}", entry)
    with path.open("a") as file:
        file.write('{"key": "key 3", "sett')
    again = RunLines(path)
    assert again.lines == {f"key {index}": {"key": f"key {index}", **entry} for index, entry in enumerate(LINES)}
    again.add("key 3", LINES[0])
    assert [json.loads(text)["key"] for text in path.read_text().splitlines()] == [f"key {i}" for i in range(4)]


def test_a_file_of_something_else_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text("[1]\n")
    with pytest.raises(StorageError, match="no run's"):
        RunLines(path)
    assert path.read_text() == "[1]\n"


def test_runs_that_differ_in_the_seed_alone_are_one_group() -> None:
    groups = groups_of(LINES)
    assert [(group.settings, len(group.lines)) for group in groups] == [
        ({"selection_strategy": "random"}, 2),
        ({"selection_strategy": "fedhds"}, 1),
    ]
    assert last_values(LINES[0], "unseen", "loss") == (4, 2)
    assert last_values(LINES[0], "unseen", "perplexity") is None
    assert last_values(LINES[0], "other", "loss") is None


def test_the_interval_is_students() -> None:
    # t(0.975, 1 degree of freedom) is tan(0.475 pi); the standard error of 1 and 2 is 1/2.
    assert interval([1.0, 2.0]) == pytest.approx(math.tan(0.475 * math.pi) / 2)
    assert interval([3.0]) == 0


def test_the_table_has_means_and_intervals() -> None:
    console = Console(width=200, record=True)
    console.print(table_of(LINES))
    text = console.export_text()
    random, fedhds = (
        next(row for row in text.splitlines() if row.strip().startswith(name)) for name in ("random", "fed")
    )
    assert "4.000→1.500 ± 6.353" in random
    assert random.split()[1:4] == ["2", "15", "±"]
    assert "of 99 " in random
    assert "4.000→1.000" in fedhds
    assert "±" not in fedhds


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    assert plot(LINES, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    unmeasured = {**LINES[0], "result": {**LINES[0]["result"], "evaluations": {}}}
    assert not plot([unmeasured], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
