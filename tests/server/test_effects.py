"""What the coordinator does beside its commit loop: it reads a state that may change, and that may not be saved yet."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import status_pb2
from fedhds_server.coordinator import effects
from fedhds_server.coordinator.uploads import owner_of
from fedhds_server.run.events import WriteCheckpoint
from tests.support.host import Host, complete, enroll, refused, send, start, task_of, written


async def accepted(host: Host, session: str, value: float) -> Artifact:
    """The update that the site's open task is completed with."""
    task = (await task_of(host, session)).task
    path, artifact = written(host, value)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    return artifact


async def test_the_state_is_read_for_the_checkpoint_where_nothing_changes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    for name in ("model_card_of", "status_of"):
        read = getattr(effects, name)

        def noted(*arguments: Any, read: Any = read) -> Any:
            threads.append(threading.current_thread())
            return read(*arguments)

        monkeypatch.setattr(effects, name, noted)
    host = await start(tmp_path)
    await task_of(host, await enroll(host))
    await host.coordinator.effects.done()
    await host.stop()
    # In a thread, a site that enrolls meanwhile would change the dictionary under the loop over it.
    assert set(threads) == {threading.main_thread()}
    assert (tmp_path / "report.json").is_file()


async def test_the_card_counts_the_rounds_that_are_closed(tmp_path: Path) -> None:
    host = await start(tmp_path, rounds=3)
    session = await enroll(host)
    for number in (1, 2):
        await accepted(host, session, number / 2)
        # The next round is open by then.
        await task_of(host, session)
        await host.coordinator.effects.done()
        assert f"| rounds | {number} of 3," in (tmp_path / "checkpoint" / "README.md").read_text()
    await host.stop()


async def test_an_end_that_cannot_be_saved_costs_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = await start(tmp_path, min_sites=2)
    sessions = [await enroll(host, name) for name in "ab"]
    artifact = await accepted(host, sessions[0], 0.5)
    await host.coordinator.effects.done()
    saving, broken, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()
    reported = asyncio.Event()
    write = host.coordinator.effects._write_report

    def save(*_: Any) -> None:
        loop.call_soon_threadsafe(saving.set)
        broken.wait(20)
        raise StorageError("the disk is full")

    def noticed(report: status_pb2.GetStatusResponse) -> None:
        write(report)
        loop.call_soon_threadsafe(reported.set)

    monkeypatch.setattr(host.coordinator.effects, "_write_report", noticed)
    with monkeypatch.context() as patched:
        patched.setattr(host.coordinator._store, "save", save)
        stopping = asyncio.create_task(refused(host.operations.Stop(status_pb2.StopRequest(reason="enough"))))
        await asyncio.wait_for(saving.wait(), 20)
        # The state says that the run is over. Nothing has made that durable, and nothing will.
        assert host.coordinator.state.phase.over
        host.coordinator.effects.start([WriteCheckpoint()])
        await asyncio.wait_for(reported.wait(), 20)
        await asyncio.sleep(0.1)
        assert host.artifacts.has(artifact)
    broken.set()
    assert isinstance(await stopping, StorageError)
    await host.coordinator.effects.done()
    assert host.artifacts.has(artifact)
    await accepted(host, sessions[1], 1.5)
    assert (await task_of(host, sessions[0])).done.outcome == "completed"
    assert host.coordinator.state.closed_rounds[0].contributions == {"a": 10, "b": 10}
    await host.stop()


async def test_what_is_remembered_of_a_sites_uploads_does_not_grow(tmp_path: Path) -> None:
    host = await start(tmp_path)
    await task_of(host, await enroll(host))
    uploads, (_, right) = host.coordinator.uploads, written(host, 0.5)
    sent = [Artifact(f"{number:064x}", right.size) for number in range(100)]
    for artifact in sent:
        await uploads.begin("a", artifact, 0)
    assert uploads.needs(sent[-1], owner_of("a"))
    assert not uploads.needs(sent[-1], owner_of("b"))
    assert sum(uploads.needs(artifact) for artifact in sent) == 1
    await host.stop()


async def test_the_manifest_is_read_once(tmp_path: Path) -> None:
    host = await start(tmp_path)
    await enroll(host)
    state = host.coordinator.state
    assert state.adapter_manifest is state.adapter_manifest
    await host.stop()
