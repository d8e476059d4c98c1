"""Artifacts that are damaged after they were acknowledged: found where they are read, and never combined or sent."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedhds.errors import ArtifactError, StorageError
from fedhds.tensors.safetensors import AdapterReader
from fedhds_server.coordinator import effects
from fedhds_server.coordinator.effects import Effects
from fedhds_server.run.activity import activity
from fedhds_server.run.events import AdapterUpdated
from fedhds_server.run.state import RunState, Stage
from tests.support.host import MANIFEST, Host, complete, enroll, refused, send, start, task_of, written


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES = pytest.mark.parametrize("damage", [flip, truncate, os.unlink])


def value(host: Host) -> float:
    """The one value that the newest global adapter holds everywhere."""
    state = host.coordinator.state
    with AdapterReader(host.artifacts.verified(state.adapter), MANIFEST) as reader:
        (value,) = {float(x) for spec in MANIFEST.tensors for x in np.unique(reader.tensor(spec))}
    return value


async def ended(host: Host, session: str) -> str:
    return str((await task_of(host, session)).done.outcome)


@DAMAGES
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_damaged_update_is_left_out_and_the_round_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], restarted: bool
) -> None:
    host = await start(tmp_path, min_sites=3)
    sessions = [await enroll(host, name) for name in "abc"]
    for name, session, number in zip("abc", sessions, (1.0, 2.0, 4.0), strict=True):
        await task_of(host, session)
        if name == "c":
            stage = host.coordinator.state.stage
            assert stage is not None
            update = stage.replies["a"].artifact
            assert update is not None
            damage(host.artifacts.path(update))
            if restarted:
                await host.stop()
                host = await start(tmp_path)
        path, artifact = written(host, number)
        await send(host, session, path.read_bytes(), artifact)
        assert (await complete(host, session, f"train/1/{name}", artifact)).accepted
    assert await ended(host, sessions[1]) == "completed"
    assert host.coordinator.state.closed_rounds[0].contributions == {"b": 10, "c": 10}
    assert value(host) == 3.0
    assert "round 1 goes on without the update of site a: the artifact" in caplog.text
    await host.stop()


@DAMAGES
async def test_an_update_that_is_damaged_before_it_counts_is_asked_for_again(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    host = await start(tmp_path)
    session = await enroll(host)
    task = (await task_of(host, session)).task
    path, artifact = written(host, 1.0)
    await send(host, session, path.read_bytes(), artifact)
    damage(host.artifacts.path(artifact))
    error = await refused(complete(host, session, task.id, artifact))
    assert isinstance(error, ArtifactError)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    await host.stop()


@DAMAGES
async def test_a_damaged_global_adapter_stops_the_run_until_it_is_put_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(effects, "_STORAGE_RETRY_S", 0.05)
    host = await start(tmp_path)
    session = await enroll(host)
    await task_of(host, session)
    adapter = host.artifacts.path(host.coordinator.state.adapters[0])
    content = adapter.read_bytes()
    path, artifact = written(host, 1.0)
    await send(host, session, path.read_bytes(), artifact)
    damage(adapter)
    assert isinstance(await refused(complete(host, session, "train/1/a", artifact)), StorageError)
    adapter.write_bytes(content)
    # Once it is put back, the update counts. Then it is the aggregation that meets the damage.
    aggregate = Effects.aggregate

    def damaged_meanwhile(self: Effects, state: RunState, stage: Stage) -> AdapterUpdated:
        if not said.is_set():
            adapter.unlink(missing_ok=True)
            adapter.write_bytes(content)
            damage(adapter)
        return aggregate(self, state, stage)

    monkeypatch.setattr(Effects, "aggregate", damaged_meanwhile)
    said, loop = asyncio.Event(), asyncio.get_running_loop()

    class Noticing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "trying again" in record.getMessage():
                loop.call_soon_threadsafe(said.set)

    noticing = Noticing()
    logging.getLogger(effects.__name__).addHandler(noticing)
    assert (await complete(host, session, "train/1/a", artifact)).accepted
    await asyncio.wait_for(said.wait(), 20)
    logging.getLogger(effects.__name__).removeHandler(noticing)
    assert f"the artifact {adapter} is" in caplog.text
    assert "put a file of" in caplog.text
    assert activity(host.coordinator.state) == "aggregating"
    adapter.write_bytes(content)
    assert await ended(host, session) == "completed"
    assert value(host) == 1.0
    await host.stop()
