"""What one peer can use of a coordinator: rates, turns, places, and one upload for each open task."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedhds.errors import SessionLost, StorageError, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import transfer_pb2
from fedhds_server.coordinator.uploads import Uploads, owner_of
from fedhds_server.rpc import federation, limits
from fedhds_server.rpc.rates import Rates
from tests.support.host import Host, complete_with, enroll, refused, send, start, task_of, written


def test_a_key_has_some_times_at_once_and_then_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    often = Rates(3, 0.5)
    assert [often.take("a") for _ in range(5)] == [True, True, True, False, False]
    assert often.take("b")
    now = 1.0
    assert not often.take("a")
    now = 2.0
    assert [often.take("a") for _ in range(2)] == [True, False]
    now = 1000.0
    assert [often.take("a") for _ in range(4)] == [True, True, True, False]


def test_keys_that_have_all_their_times_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    often = Rates(1, 1.0)
    for number in range(10_000):
        now += 0.001
        assert often.take(str(number))
    assert not often.take("9999")
    assert len(often._left) < 6000


async def code_of(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return caught.value.code(), str(caught.value.details())


async def test_a_peer_whose_calls_never_say_anything_has_a_bounded_number_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_MAX_WAITING", 20)
    host = await start(tmp_path)
    session = await enroll(host)
    heartbeat = host.channel.stream_unary("/fedhds.v2.Federation/Heartbeat")
    silent = [heartbeat() for _ in range(30)]
    ended = list(asyncio.as_completed(silent, timeout=20))
    for call in ended[:10]:
        code, details = await code_of(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "wait to be read" in details
    for call in silent:
        call.cancel()
    await asyncio.gather(*ended[10:], return_exceptions=True)
    # One that ends makes room again.
    await host.federation.Heartbeat(pb.HeartbeatRequest(session=session), timeout=20)
    await host.stop()


async def test_a_site_that_comes_and_goes_all_the_time_is_refused_for_a_while_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation, "_ARRIVALS", 3)
    host = await start(tmp_path, min_sites=2)
    request = pb.EnrollRequest(site="a", protocol_versions=[2], session="0" * 64)
    for _ in range(3):
        await host.federation.Enroll(request)
    code, details = await code_of(host.federation.Enroll(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details == "the site 'a' enrolls and registers too often; try again later"
    await enroll(host, "b")
    await host.stop()


async def test_a_site_that_has_left_enrolls_before_it_registers(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    session = await enroll(host)
    await host.federation.Leave(pb.LeaveRequest(session=session))
    request = pb.RegisterRequest(session=session, rows=1)
    with pytest.raises(grpc.aio.AioRpcError):
        await host.federation.Register(request)
    assert [line.message for _, line in host.coordinator.journal if " enrolled " in line.message] == [
        "site a enrolled with 10 rows"
    ]
    await host.stop()


async def in_training(folder: Path) -> tuple[Host, str, pb.Task]:
    host = await start(folder)
    session = await enroll(host)
    return host, session, (await task_of(host, session)).task


def parts(host: Host) -> set[str]:
    return {path.name for path in host.artifacts.folder.glob("*.part")}


async def test_an_upload_ends_with_its_task_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, session, task = await in_training(tmp_path)
    path, artifact = written(host, 0.5)
    content, sending, begun = path.read_bytes(), asyncio.Event(), asyncio.Event()
    append, loop = host.artifacts.append, asyncio.get_running_loop()

    def noticed(*arguments: Any) -> None:
        append(*arguments)
        loop.call_soon_threadsafe(begun.set)

    monkeypatch.setattr(host.artifacts, "append", noticed)

    async def slowly():  # type: ignore[no-untyped-def]
        header = transfer_pb2.UploadHeader(session=session, artifact=artifact.to_proto())
        yield transfer_pb2.UploadRequest(header=header)
        yield transfer_pb2.UploadRequest(chunk=content[:100])
        await sending.wait()
        yield transfer_pb2.UploadRequest(chunk=content[100:])

    upload = asyncio.ensure_future(refused(host.federation.Upload(slowly())))
    await asyncio.wait_for(begun.wait(), 20)
    assert parts(host) == {f"{artifact.digest}-{owner_of('a')}.part"}
    # Nothing to train on: the task is completed, whatever is being sent.
    assert (await complete_with(host, session, task.id, pb.TrainResult())).accepted
    sending.set()
    assert isinstance(await upload, TaskError)
    await host.coordinator.effects.done()
    assert not parts(host)
    assert not host.artifacts.has(artifact)
    await host.stop()


async def test_a_second_upload_of_a_site_takes_the_place_of_the_first(tmp_path: Path) -> None:
    host, session, task = await in_training(tmp_path)
    (first, earlier), (second, later) = written(host, 0.25), written(host, 0.5)
    await send(host, session, first.read_bytes(), earlier)
    assert host.artifacts.has(earlier)
    await send(host, session, second.read_bytes(), later)
    await host.coordinator.effects.done()
    assert (host.artifacts.has(earlier), host.artifacts.has(later)) == (False, True)
    result = pb.TrainResult(update=later.to_proto(), samples=10, loss=1.0)
    assert (await complete_with(host, session, task.id, result)).accepted
    await host.stop()


async def test_an_upload_waits_for_room_and_is_taken_when_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, session, _ = await in_training(tmp_path)
    path, artifact = written(host, 0.5)
    blocks = 1 << 20
    full = os.statvfs_result((4096, 4096, blocks, blocks // 30, blocks // 30, 0, 0, 0, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: full)
        error = await refused(send(host, session, path.read_bytes(), artifact))
        assert isinstance(error, StorageError)
        assert "has to wait; make room there" in str(error)
        # All else goes on.
        await enroll(host, "b")
    await send(host, session, path.read_bytes(), artifact)
    await host.stop()


async def test_what_an_earlier_coordinator_left_of_an_open_upload_goes_with_its_task(tmp_path: Path) -> None:
    host, session, task = await in_training(tmp_path)
    path, artifact = written(host, 0.5)
    await refused(send(host, session, path.read_bytes()[:100], artifact))
    host.coordinator.uploads = Uploads(host.coordinator)
    assert (await complete_with(host, session, task.id, pb.TrainResult())).accepted
    await host.coordinator.effects.done()
    assert not parts(host)
    await host.stop()


async def test_results_that_come_together_are_checked_one_by_one_and_one_counts(tmp_path: Path) -> None:
    host, session, task = await in_training(tmp_path)
    results = [pb.TrainResult(train_s=float(number)) for number in range(1, 6)]
    answers = await asyncio.gather(*(complete_with(host, session, task.id, result) for result in results))
    assert [answer.accepted for answer in answers].count(True) == 1
    assert {answer.reason for answer in answers if not answer.accepted} == {
        "another result of this task was accepted; this one does not count"
    }
    await host.stop()


async def test_a_session_is_of_no_use_with_another_key(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    session = await enroll(host)
    presence = host.coordinator.presence
    assert presence.named(session, "") == "a"
    with pytest.raises(SessionLost):
        presence.named(session, "0" * 64)
    await host.stop()


async def test_senders_of_the_same_digest_do_not_keep_what_the_other_left(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    sessions = {name: await enroll(host, name) for name in "ab"}
    tasks = {name: (await task_of(host, session)).task for name, session in sessions.items()}
    path, artifact = written(host, 0.5)
    for session in sessions.values():
        await refused(send(host, session, path.read_bytes()[:100], artifact))
    assert len(parts(host)) == 2
    assert (await complete_with(host, sessions["a"], tasks["a"].id, pb.TrainResult())).accepted
    await host.coordinator.effects.done()
    assert parts(host) == {f"{artifact.digest}-{owner_of('b')}.part"}
    await host.stop()
