"""The benchmark of secure rounds runs, and compares like with like."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.secure import measure


def test_both_rounds_of_a_small_case_are_measured(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []
    measure(argparse.Namespace(folder=tmp_path, sites=[5], adapters=[0.25], dropouts=[0.0, 0.2]), lines.append)
    assert [(line["sites"], line["dropouts"]) for line in lines] == [(5, 0), (5, 1)]
    for line in lines:
        assert line["seconds_ratio"] > 0
        # Four bytes for each value in both; keys and shares are small beside them.
        assert 0.99 < line["bytes_ratio"] < 1.05
        assert line["secure"]["site_cpu_s"] > 0
        assert line["secure"]["coordinator_cpu_s"] > 0
