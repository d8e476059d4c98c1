"""What sites cost that wait, how long a round's opening takes to reach them, and what it costs when all answer at once.

Waiting sites are sessions of four load processes over TLS, on a connection each or on one per process. The storm posts
the results of all sites but one to a real coordinator and store in this process, without the network.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from benchmarks import transport
from benchmarks.transport_load import FINGERPRINT, manifest_of
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds_server.aggregation import AGGREGATORS
from fedhds_server.coordinator import Coordinator
from fedhds_server.run.events import SiteConnected, SiteRegistered, UpdateReceived
from fedhds_server.run.state import RunState
from fedhds_server.selection import STRATEGIES
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.sql import SqlStore

Line = dict[str, Any]

_PROCESSES = 4
_CHANNELS = {"own": True, "shared": False}


def measure_idle(chosen: argparse.Namespace, certificates: Path, write: Callable[[Line], None]) -> None:
    """Idle sites, in each number."""
    for count in chosen.sites:
        for channels, own in _CHANNELS.items():
            facts = {"part": "idle", "sites": count, "channels": channels}
            write(facts | idle(count, own, chosen, certificates) | {"at": round(time.time())})


def measure_storms(chosen: argparse.Namespace, write: Callable[[Line], None]) -> None:
    """Results of sites in each number."""
    for count in chosen.sites:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            write({"part": "storm", "sites": count} | asyncio.run(storm(Path(folder), count)))


def idle(count: int, own: bool, chosen: argparse.Namespace, certificates: Path) -> Line:
    """CPU and memory of a coordinator with `count` idle sites, then the seconds until all have a task."""
    names = [f"load-{number % _PROCESSES}/{number:04d}" for number in range(count)]
    groups = [group for number in range(_PROCESSES) if (group := names[number::_PROCESSES])]
    with tempfile.TemporaryDirectory(dir=chosen.folder) as run:
        flags = ["--rounds", 1, "--min-sites", count + 1, "--evaluate-every", 0]
        with transport.coordinator(Path(run), certificates, *flags) as (server, target):
            time.sleep(1)
            empty_mb, started = transport.memory_mb(server, "VmRSS"), time.monotonic()
            sites = [_arguments(target, certificates, number, group, own) for number, group in enumerate(groups)]
            with transport.loads("idle", sites) as (lines, _):
                _all(lines, "enrolled", count)
                line: Line = {"enroll_s": round(time.monotonic() - started, 2)}
                time.sleep(2)
                used = transport.cpu_s(server)
                time.sleep(60 * chosen.minutes)
                line["cpu_s_per_minute"] = round((transport.cpu_s(server) - used) / chosen.minutes, 3)
                line["mb"], line["empty_mb"] = transport.memory_mb(server, "VmRSS"), empty_mb
                last = [_arguments(target, certificates, 0, ["load-0/last"], own)]
                with transport.loads("idle", last):
                    line["task_s"] = round(_all(lines, "task", count) - _opened(Path(run)), 3)
    return line


def _arguments(target: str, certificates: Path, number: int, sites: list[str], own: bool) -> Line:
    files = transport.tls_files(certificates, number)
    return {"target": target, "sites": sites, "own_channels": own, "tls": files}


def _all(lines: Iterator[Line], name: str, count: int) -> float:
    """The last of the wall times at which the sites report `name`."""
    return max(float(next(line for line in lines if name in line)[name]) for _ in range(count))


def _opened(run: Path) -> float:
    """When the first round was opened, by the run's journal."""
    with closing(sqlite3.connect(run / "run.db")) as database:
        query = "select at from journal where message like 'round 1 of % opens with %'"
        return float(database.execute(query).fetchone()[0])


class CountingStore(SqlStore):
    """The store of a run folder; counts saves and the seconds that they take."""

    saves, seconds = 0, 0.0

    def save(self, state: RunState, entries: Any = ()) -> None:
        started = time.monotonic()
        super().save(state, entries)
        self.saves += 1
        self.seconds += time.monotonic() - started


async def storm(folder: Path, count: int) -> Line:
    """Seconds until `count` sites that answer at the same instant have heard that their results are durable."""
    spec = RunSpec.of(model="m", rounds=1, min_sites=count + 1, selection_strategy="full", heartbeat_timeout=3600)
    manifest = manifest_of(1 << 20)
    fingerprint = {field.name: getattr(FINGERPRINT, field.name) for field in FINGERPRINT.DESCRIPTOR.fields}
    state = RunState(run_id="r", spec=spec)
    names = [f"site-{number:06d}" for number in range(count + 1)]
    line: Line = {}
    with closing(CountingStore(URL.create("sqlite", database=str(folder / "run.db")))) as store:
        store.acquire("storm", "", 3600)
        store.save(state)
        coordinator = Coordinator(
            state,
            store=store,
            artifacts=ArtifactStore(folder / "artifacts", largest_upload=1 << 30),
            folder=folder,
            strategy=STRATEGIES["full"],
            aggregator=AGGREGATORS["fedavg"],
        )
        work = asyncio.create_task(coordinator.run())
        await asyncio.gather(*(coordinator.post(SiteConnected(name, "", name)) for name in names))
        await asyncio.gather(
            *(coordinator.post(SiteRegistered(0.0, name, 10, False, fingerprint, manifest)) for name in names)
        )
        while len(coordinator.state.tasks) <= count:
            # What an event in this process waits for: the instructions of all those before it.
            await coordinator.post(lambda _: None)
        tasks = list(coordinator.state.tasks)[:count]
        for pattern, size in (("together", count), ("one by one", 1)):
            store.saves, store.seconds, started = 0, 0.0, time.monotonic()
            chosen, tasks = (tasks[: count // 2 or 1], tasks[count // 2 :]) if size > 1 else (tasks[:100], [])
            for begin in range(0, len(chosen), size):
                events = [
                    UpdateReceived(0.0, task, Artifact(f"{number:064x}", 1), 10, 1.0)
                    for number, task in enumerate(chosen[begin : begin + size])
                ]
                await asyncio.gather(*map(coordinator.post, events))
            if chosen:
                seconds = time.monotonic() - started
                facts = {"events": len(chosen), "seconds": round(seconds, 4), "saves": store.saves}
                line[pattern] = facts | {"save_ms": round(store.seconds / max(1, store.saves) * 1e3, 2)}
        line["state_kb"] = round(len(coordinator.state.model_dump_json()) / 1e3, 1)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    return line


def show(lines: list[Line]) -> None:
    """Prints Markdown tables of the latest lines."""
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
    storms = {line["sites"]: line for line in lines if line["part"] == "storm"}
    if storms:
        print("\n| sites | state kB | together: s for half of them | saves | one by one: ms each | of it saving |")
        print("| --: | --: | --: | --: | --: | --: |")
    for sites, line in sorted(storms.items()):
        together, single = line["together"], line.get("one by one", {"seconds": 0, "events": 1, "save_ms": 0})
        each = f"{single['seconds'] / single['events'] * 1e3:.1f} | {single['save_ms']:.1f}"
        print(f"| {sites} | {line['state_kb']:.0f} | {together['seconds']:.3f} | {together['saves']} | {each} |")
