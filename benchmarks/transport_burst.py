"""What results cost that come at once: those of all sites but one, without the network.

They are posted to a real coordinator over a real store, in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from google.protobuf.any_pb2 import Any
from sqlalchemy import URL

from benchmarks.transport_daemons import Line
from benchmarks.transport_load import FINGERPRINT, manifest_of
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.coordinator import Coordinator
from fedhds_server.run.events import ResultReceived, SiteConnected, SiteRegistered
from fedhds_server.run.state import RunState
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.sql import SqlStore


def measure_bursts(arguments: argparse.Namespace, write: Callable[[Line], None]) -> None:
    """Results of sites in each number."""
    for count in arguments.sites:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write({"part": "burst", "sites": count} | asyncio.run(burst(Path(folder), count)))


class CountingStore(SqlStore):
    """The store of a run folder; counts saves and the seconds that they take."""

    saves, seconds = 0, 0.0

    def save(self, state: RunState, entries: Sequence[JournalEntry] = ()) -> None:
        started = time.monotonic()
        super().save(state, entries)
        self.saves += 1
        self.seconds += time.monotonic() - started


async def burst(folder: Path, count: int) -> Line:
    """Seconds until `count` sites that answer at the same instant have heard that their results are durable."""
    spec = RunSpec.of(model="m", rounds=1, min_sites=count + 1, selection_strategy="full", heartbeat_timeout=3600)
    manifest = manifest_of(1 << 20)
    fingerprint = {field.name: getattr(FINGERPRINT, field.name) for field in FINGERPRINT.DESCRIPTOR.fields}
    state = RunState(run_id="r", spec=spec)
    names = [f"site-{number:06d}" for number in range(count + 1)]
    result = Any()
    result.Pack(pb.TrainResult(samples=10, loss=1.0))
    line: Line = {}
    with closing(CountingStore(URL.create("sqlite", database=str(folder / "run.db")))) as store:
        store.acquire("burst", "", 3600)
        store.save(state)
        coordinator = Coordinator(
            state,
            store=store,
            artifacts=ArtifactStore(folder / "artifacts", largest_upload=1 << 30),
            folder=folder,
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
            batch, tasks = (tasks[: count // 2 or 1], tasks[count // 2 :]) if size > 1 else (tasks[:100], [])
            for begin in range(0, len(batch), size):
                events = [
                    ResultReceived(0.0, task, result, Artifact(f"{number:064x}", 1))
                    for number, task in enumerate(batch[begin : begin + size])
                ]
                await asyncio.gather(*map(coordinator.post, events))
            if batch:
                seconds = time.monotonic() - started
                labels = {"events": len(batch), "seconds": round(seconds, 4), "saves": store.saves}
                line[pattern] = labels | {"save_ms": round(store.seconds / max(1, store.saves) * 1e3, 2)}
        line["state_kb"] = round(len(coordinator.state.model_dump_json()) / 1e3, 1)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    return line


def show(lines: list[Line]) -> None:
    """Prints a Markdown table of the latest lines."""
    bursts = {line["sites"]: line for line in lines if line["part"] == "burst"}
    if bursts:
        print("\n| sites | state kB | together: s for half of them | saves | one by one: ms each | of it saving |")
        print("| --: | --: | --: | --: | --: | --: |")
    for sites, line in sorted(bursts.items()):
        together, single = line["together"], line.get("one by one", {"seconds": 0, "events": 1, "save_ms": 0})
        each = f"{single['seconds'] / single['events'] * 1e3:.1f} | {single['save_ms']:.1f}"
        print(f"| {sites} | {line['state_kb']:.0f} | {together['seconds']:.3f} | {together['saves']} | {each} |")
