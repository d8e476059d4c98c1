"""What waiting sites cost, and how long the opening of a round takes to reach them.

They are sessions of four load processes over TLS, on a connection each or on one per process.
"""

from __future__ import annotations

import argparse
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from benchmarks.transport_daemons import PROCESSES, Line, coordinator, cpu_s, loads, memory_mb, tls_files

_CHANNELS = {"own": True, "shared": False}


def measure_idle(arguments: argparse.Namespace, certificates: Path, write: Callable[[Line], None]) -> None:
    """Idle sites, in each number."""
    for count in arguments.sites:
        for channels, own in _CHANNELS.items():
            labels = {"part": "idle", "sites": count, "channels": channels}
            write(labels | idle(count, own, arguments, certificates) | {"at": round(time.time())})


def idle(count: int, own: bool, arguments: argparse.Namespace, certificates: Path) -> Line:
    """CPU and memory of a coordinator with `count` idle sites, then the seconds until all have a task."""
    names = [f"load-{number % PROCESSES}/{number:04d}" for number in range(count)]
    groups = [group for number in range(PROCESSES) if (group := names[number::PROCESSES])]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as run:
        flags = ["--rounds", 1, "--min-sites", count + 1, "--evaluate-every", 0]
        with coordinator(Path(run), certificates, *flags) as (server, target):
            time.sleep(1)
            empty_mb, started = memory_mb(server, "VmRSS"), time.monotonic()
            sites = [_arguments(target, certificates, number, group, own) for number, group in enumerate(groups)]
            with loads("idle", sites) as (lines, _):
                _all(lines, "enrolled", count)
                line: Line = {"enroll_s": round(time.monotonic() - started, 2)}
                time.sleep(2)
                used = cpu_s(server)
                time.sleep(60 * arguments.minutes)
                line["cpu_s_per_minute"] = round((cpu_s(server) - used) / arguments.minutes, 3)
                line["mb"], line["empty_mb"] = memory_mb(server, "VmRSS"), empty_mb
                last = [_arguments(target, certificates, 0, ["load-0/last"], own)]
                with loads("idle", last):
                    line["task_s"] = round(_all(lines, "task", count) - _opened(Path(run)), 3)
    return line


def _arguments(target: str, certificates: Path, number: int, sites: list[str], own: bool) -> Line:
    files = tls_files(certificates, number)
    return {"target": target, "sites": sites, "own_channels": own, "tls": files}


def _all(lines: Iterator[Line], name: str, count: int) -> float:
    """The last of the wall times at which the sites report `name`."""
    return max(float(next(line for line in lines if name in line)[name]) for _ in range(count))


def _opened(run: Path) -> float:
    """When the first round was opened, by the run's journal."""
    with closing(sqlite3.connect(run / "run.db")) as database:
        query = "select at from journal where message like 'round 1 of % opens with %'"
        return float(database.execute(query).fetchone()[0])


def show(lines: list[Line]) -> None:
    """Prints a Markdown table of the latest lines."""
    waiting = {(line["sites"], line["channels"]): line for line in lines if line["part"] == "idle"}
    if waiting:
        print(
            "\n| idle sites | connections | CPU s/min | CPU ms per site-minute | MB | kB per site | enroll s | task s |"
        )
        print("| --: | --- | --: | --: | --: | --: | --: | --: |")
    for (sites, channels), line in sorted(waiting.items()):
        over = line["mb"] - line["empty_mb"]
        each = f"{line['cpu_s_per_minute'] / sites * 1e3:.2f} | {over:.1f} | {over / sites * 1e3:.0f}"
        ends = f"{line['enroll_s']:.1f} | {line['task_s']:.2f}"
        print(f"| {sites} | {channels} | {line['cpu_s_per_minute']:.2f} | {each} | {ends} |")
