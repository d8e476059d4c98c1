"""Results that come too late, and answers that a site gets only when what they say is saved."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import StorageError
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import status_pb2
from fedhds_server.rpc import federation
from fedhds_server.rpc.validation import check_result
from fedhds_server.run.events import DeadlineReached, TaskFailed
from tests.support.host import complete, complete_with, enroll, refused, send, start, task_of, written


async def test_a_result_that_is_checked_while_its_round_closes_is_answered_as_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await start(tmp_path, min_sites=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await task_of(host, a)
    for session, name, value in ((a, "a", 0.5), (b, "b", 1.5)):
        path, artifact = written(host, value)
        await send(host, session, path.read_bytes(), artifact)
        if name == "b":
            # Nobody waits for a site longer than the deadline, also not while its update is read.
            async def checked(*arguments: Any) -> Any:
                found = await check_result(*arguments)
                await host.coordinator.post(DeadlineReached(time.time(), "train/1"))
                return found

            monkeypatch.setattr(federation, check_result.__name__, checked)
        answer = await complete(host, session, f"train/1/{name}", artifact)
        assert answer.accepted == (name == "a")
    assert answer.reason == "the task is closed; its result came too late to count"
    assert not host.artifacts.has(artifact)
    assert (await task_of(host, b)).done.outcome == "completed"
    assert host.coordinator.state.closed_rounds[0].contributions == {"a": 10}
    await host.stop()


async def test_a_task_that_is_closed_before_it_is_answered_is_not_handed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = await start(tmp_path)
    session = await enroll(host)
    await task_of(host, session)
    next_task: Any = host.coordinator.presence.next_task

    async def closed(*arguments: Any) -> Any:
        task = await next_task(*arguments)
        await host.coordinator.post(TaskFailed(time.time(), task.id, "no memory"))
        return task

    monkeypatch.setattr(host.coordinator.presence, "next_task", closed)
    answer = await host.federation.NextTask(pb.NextTaskRequest(session=session))
    assert answer.WhichOneof("next") == "wait"
    await host.stop()


@pytest.mark.parametrize("saved", [True, False])
async def test_a_site_that_asks_again_hears_that_its_result_is_accepted_only_when_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    host = await start(tmp_path)
    session = await enroll(host)
    task = (await task_of(host, session)).task
    await host.coordinator.effects.done()
    save, saving, broken, loop = host.coordinator._store.save, asyncio.Event(), threading.Event(), host.work.get_loop()

    def slow(*arguments: Any) -> None:
        if not broken.is_set():
            loop.call_soon_threadsafe(saving.set)
            broken.wait(20)
            if not saved:
                raise StorageError("the disk is full")
        save(*arguments)

    monkeypatch.setattr(host.coordinator._store, "save", slow)
    # Nothing to train on: the stage closes, and so does the run after it.
    completing = asyncio.create_task(complete_with(host, session, task.id, pb.TrainResult()))
    await asyncio.wait_for(saving.wait(), 20)
    again = asyncio.create_task(complete_with(host, session, task.id, pb.TrainResult()))
    await asyncio.sleep(0.2)
    assert not again.done()
    broken.set()
    if saved:
        assert (await completing).accepted
        assert (await again).accepted
    else:
        assert isinstance(await refused(completing), StorageError)
        # The task is open again, and this call completes it.
        assert (await again).accepted
    state = host.coordinator._store.load()
    assert state is not None
    assert state.sites["a"].last_accepted == task.id
    await host.stop()


async def test_a_site_hears_of_the_end_only_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = await start(tmp_path)
    session = await enroll(host)
    await task_of(host, session)
    await host.coordinator.effects.done()
    saving, broken, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def save(*_: Any) -> None:
        loop.call_soon_threadsafe(saving.set)
        broken.wait(20)
        raise StorageError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(host.coordinator._store, "save", save)
        stopping = asyncio.create_task(refused(host.operations.Stop(status_pb2.StopRequest(reason="enough"))))
        await asyncio.wait_for(saving.wait(), 20)
        asking = asyncio.create_task(task_of(host, session))
        await asyncio.sleep(0.2)
        assert host.coordinator.state.phase.over
        assert not asking.done()
    broken.set()
    assert isinstance(await stopping, StorageError)
    assert (await asking).task.id == "train/1/a"
    await host.stop()
