"""What operators do to a run, over real gRPC: pause, resume, stop, evict; and what only time does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedhds.errors import Evicted, RequestError, RunOver, TaskError, UsageError
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2, status_pb2
from fedhds_server.run.state import SiteState
from tests.support.host import (
    Host,
    complete,
    complete_with,
    enroll,
    pause,
    refused,
    resume,
    send,
    start,
    task_of,
    written,
)


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts coordinators that are stopped with the test."""
    made: list[Host] = []

    async def begin(**fields: object) -> Host:
        made.append(await start(tmp_path, **fields))
        return made[-1]

    yield begin
    for host in made:
        await host.stop()


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Returns once `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what it waits for is plain state, which no event announces
            await asyncio.sleep(0.01)


def deadline_reached(host: Host) -> bool:
    stage = host.coordinator.state.stage
    return stage is not None and stage.deadline_reached


async def stop(host: Host, reason: str = "good enough") -> None:
    await host.operations.Stop(status_pb2.StopRequest(reason=reason))


async def evict(host: Host, site: str, reason: str = "withdrew its consent") -> None:
    await host.operations.Evict(status_pb2.EvictRequest(site=site, reason=reason))


async def status(host: Host, journal_after: int = 0) -> status_pb2.GetStatusResponse:
    answer: status_pb2.GetStatusResponse = await host.operations.GetStatus(
        status_pb2.GetStatusRequest(journal_after=journal_after)
    )
    return answer


async def poll(host: Host, session: str, wait_s: float = 0.0) -> pb.NextTaskResponse:
    answer: pb.NextTaskResponse = await host.federation.NextTask(pb.NextTaskRequest(session=session, wait_s=wait_s))
    return answer


async def deliver(host: Host, session: str, value: float = 0.5, *, samples: int = 10) -> pb.CompleteTaskResponse:
    """Does the site's train task."""
    task = (await task_of(host, session)).task
    path, artifact = written(host, value)
    await send(host, session, path.read_bytes(), artifact)
    return await complete(host, session, task.id, artifact, samples)


async def confirm(host: Host, session: str) -> None:
    """The site has the final adapter and goes."""
    await host.federation.ConfirmDelivery(pb.ConfirmDeliveryRequest(session=session))
    await host.federation.Leave(pb.LeaveRequest(session=session))


async def test_a_pause_hands_out_nothing_new_takes_what_is_in_work_and_ends(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, rounds=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await task_of(host, a)
    in_work = (await task_of(host, b)).task
    await pause(host, "a new disk")
    for session in (a, b):
        assert (await poll(host, session)).wait.reason == "the run is paused: a new disk"
    # A long poll that begins in the pause is held for as long as it asks for.
    began = time.monotonic()
    assert (await poll(host, a, 0.3)).wait.reason == "the run is paused: a new disk"
    assert time.monotonic() - began >= 0.3
    path, artifact = written(host, 0.5)
    await send(host, b, path.read_bytes(), artifact)
    assert (await complete(host, b, in_work.id, artifact)).accepted
    assert (await status(host)).paused == "a new disk"
    # A poll that is open when the pause ends is answered at once.
    waiting = asyncio.ensure_future(poll(host, a, 20))
    await until(lambda: "a" in host.coordinator.presence._waiting)
    await resume(host, "it is in")
    assert (await asyncio.wait_for(waiting, 5)).task.id == "train/1/a"
    answer = await status(host)
    assert not answer.HasField("paused")
    said = [line.message for line in answer.journal]
    assert said[-2:] == ["the run is paused: a new disk", "the run goes on: it is in"]
    await deliver(host, a)
    assert (await task_of(host, b)).task.id == "train/2/b"


async def test_open_polls_hear_of_a_pause_and_of_its_end_at_once(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=3)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    waits = host.coordinator.presence._waiting
    for change, reason in (
        (lambda: pause(host, "a new disk"), "the run is paused: a new disk"),
        (lambda: resume(host), "waiting for 1 more site"),
    ):
        polls = [asyncio.ensure_future(poll(host, session, 20)) for session in (a, b)]
        await until(lambda: len(waits) == 2)
        await change()
        answers = await asyncio.wait_for(asyncio.gather(*polls), 5)
        assert [answer.wait.reason for answer in answers] == [reason] * 2


async def test_a_run_that_was_paused_is_paused_after_a_restart(hosts: Callable[..., Any]) -> None:
    first = await hosts()
    a = await enroll(first)
    await pause(first, "night")
    await first.stop()
    second = await hosts()
    assert (await poll(second, a)).wait.reason == "the run is paused: night"
    await resume(second)
    assert (await task_of(second, a)).task.id == "train/1/a"


async def test_a_deadline_closes_a_round_with_its_quorum_and_a_pause_holds_it_up(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, quorum="1", deadline=0.5)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    slow = (await task_of(host, b)).task
    await pause(host)
    assert (await poll(host, a, 1.5)).HasField("wait")
    assert not deadline_reached(host)
    await resume(host)
    await deliver(host, a)
    # b lives and works, but the deadline has come.
    await until(lambda: host.coordinator.state.phase.over)
    assert [closed.contributions for closed in host.coordinator.state.closed_rounds] == [{"a": 10}]
    path, artifact = written(host, 0.25)
    assert isinstance(await refused(send(host, b, path.read_bytes(), artifact)), TaskError)
    late = await complete(host, b, slow.id, artifact)
    assert (late.accepted, "too late" in late.reason) == (False, True)
    assert "the deadline of 0.5 s is reached" in "\n".join(line.message for line in (await status(host)).journal)


async def test_a_pause_uses_no_deadline_up_however_busy_the_coordinator_is(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, deadline=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await until(lambda: host.coordinator.timers._stage == "train/1")
    await pause(host)
    for _ in range(6):
        # Nothing else of this process runs meanwhile: it looks at the time only now and then.
        time.sleep(0.8)  # noqa: ASYNC251
        await asyncio.sleep(0.05)
    await resume(host)
    for session in (a, b):
        assert (await poll(host, session)).HasField("task")
    await asyncio.sleep(0.5)
    assert not deadline_reached(host)
    await until(lambda: deadline_reached(host))


async def test_a_deadline_waits_for_the_quorum(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, quorum="2", deadline=0.2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await deliver(host, a)
    await until(lambda: deadline_reached(host))
    assert not host.coordinator.state.closed_rounds
    await deliver(host, b)
    await until(lambda: host.coordinator.state.phase.over)
    assert host.coordinator.state.closed_rounds[0].contributions == {"a": 10, "b": 10}


async def test_a_deadline_closes_a_selection_too(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, selection_strategy="fedhds", deadline=0.5)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    task, _ = (await task_of(host, a)).task, await task_of(host, b)
    report = selection_pb2.ClusterReport(dimension=2, centroids=[selection_pb2.Centroid(values=[0, 0], size=10)])
    assert (await complete_with(host, a, task.id, report)).accepted
    assert (await task_of(host, a)).task.id == "train/1/a"
    assert (await poll(host, b)).HasField("wait")
    await deliver(host, a, samples=1)
    assert (await task_of(host, b)).done.outcome == "completed"


async def test_stopping_gives_every_site_the_adapter_as_it_is(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, rounds=9)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await deliver(host, a)
    await deliver(host, b)
    await task_of(host, b)
    await deliver(host, a, 0.75)
    after_one = host.coordinator.state.adapters[1]
    waiting = asyncio.ensure_future(poll(host, a, 20))
    await until(lambda: "a" in host.coordinator.presence._waiting)
    await stop(host, "good enough")
    for answer in (await asyncio.wait_for(waiting, 5), await poll(host, b)):
        assert (answer.done.outcome, answer.done.message) == ("stopped", "good enough")
        assert answer.done.adapter == after_one.to_proto()
    for session in (a, b):
        await confirm(host, session)
    assert [site.delivered for site in (await status(host)).sites] == [True, True]
    await asyncio.wait_for(host.work, 10)
    assert (host.folder / "checkpoint" / "adapter_model.safetensors").exists()
    # The update of the round that was open is gone; the first and the last adapter stay.
    assert {file.name for file in (host.folder / "artifacts").iterdir()} == {
        host.coordinator.state.adapters[0].digest,
        after_one.digest,
    }


async def test_stopping_a_run_that_is_paused_or_has_not_begun(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2)
    a = await enroll(host, "a")
    await pause(host)
    await stop(host, "nobody else comes")
    assert (await poll(host, a)).done.outcome == "stopped"
    assert not (await status(host)).HasField("paused")


async def test_an_evicted_site_is_out_for_good_and_the_others_go_on(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=3, quorum="2")
    a, b, c = [await enroll(host, name) for name in "abc"]
    assert (await deliver(host, a, 0.25)).accepted
    assert host.coordinator.state.stage
    (dropped,) = host.coordinator.state.stage.uploads
    path, artifact = written(host, 0.75)
    await task_of(host, c)
    await evict(host, "a", "withdrew its consent")
    await until(lambda: not host.artifacts.has(dropped))
    # A long poll hears of it at once.
    await pause(host)
    waiting = asyncio.ensure_future(poll(host, c, 20))
    await until(lambda: "c" in host.coordinator.presence._waiting)
    await evict(host, "c", "sends nonsense")
    assert isinstance(await asyncio.wait_for(refused(waiting), 5), Evicted)
    await resume(host)
    for session, words in ((a, "withdrew its consent"), (c, "sends nonsense")):
        for call in (
            poll(host, session),
            host.federation.Heartbeat(pb.HeartbeatRequest(session=session)),
            send(host, session, path.read_bytes(), artifact),
            complete(host, session, "train/1/c", artifact),
        ):
            error = await refused(call)
            assert isinstance(error, Evicted)
            assert words in str(error)
    assert isinstance(await refused(enroll(host, "a", previous_session=a)), Evicted)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await enroll(host, "c", previous_session=c)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert [site.state for site in (await status(host)).sites] == ["evicted", "enrolled", "evicted"]
    assert (await deliver(host, b)).accepted
    # Two answers are the quorum, and nobody is left to give the second.
    assert "waits for its quorum" in host.coordinator.state.message
    await stop(host)
    assert (await task_of(host, b)).done.outcome == "stopped"


async def test_the_last_site_that_works_is_evicted_and_the_round_closes_without_it(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await deliver(host, a, 0.25)
    await task_of(host, b)
    await evict(host, "b")
    await until(lambda: host.coordinator.state.phase.over)
    assert host.coordinator.state.closed_rounds[0].contributions == {"a": 10}
    # Nobody waits for it to fetch the adapter.
    await confirm(host, a)
    await asyncio.wait_for(host.work, 10)


@pytest.mark.parametrize("reason", ["", "  \n ", "x" * 501])
async def test_reasons_are_required_and_bounded(hosts: Callable[..., Any], reason: str) -> None:
    host = await hosts(min_sites=2)
    await enroll(host)
    for call in (pause(host, reason), stop(host, reason), evict(host, "a", reason)):
        error = await refused(call)
        assert isinstance(error, UsageError)
        assert "--reason" in str(error)
    state = host.coordinator.state
    assert (state.paused, state.phase.over, state.sites["a"].state) == (None, False, SiteState.ENROLLED)


async def test_nobody_can_be_evicted_who_never_enrolled(hosts: Callable[..., Any]) -> None:
    host = await hosts()
    error = await refused(evict(host, "no-such-site"))
    assert isinstance(error, TaskError)
    assert "no site 'no-such-site' has ever enrolled" in str(error)


async def test_a_run_that_is_over_cannot_be_changed(hosts: Callable[..., Any]) -> None:
    host = await hosts()
    await enroll(host)
    await stop(host)
    for call in (pause(host), resume(host), stop(host), evict(host, "a")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert isinstance(await refused(pause(host)), RunOver)


async def test_the_journal_is_numbered_and_read_on_from_a_number(hosts: Callable[..., Any]) -> None:
    first = await hosts(min_sites=2)
    await enroll(first)
    await pause(first, "one")
    await resume(first)
    lines = (await status(first)).journal
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    enrolled, model, *rest = [line.message for line in lines]
    assert (enrolled, rest) == ("site a enrolled with 10 rows", ["the run is paused: one", "the run goes on"])
    assert model.startswith("the run's base model is that of site a, the first to register")
    assert [line.trouble for line in lines] == [False, False, True, False]
    assert abs(lines[-1].at - time.time()) < 60
    await first.stop()
    second = await hosts()
    await pause(second, "two")
    assert [line.message for line in (await status(second, 4)).journal] == ["the run is paused: two"]
    assert [line.number for line in (await status(second, 3)).journal] == [4, 5]
    assert not (await status(second, 5)).journal


async def test_the_journal_answers_at_most_its_newest_hundred_lines(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2)
    for number in range(60):
        await pause(host, f"{number}")
        await resume(host)
    numbers = [line.number for line in (await status(host)).journal]
    assert numbers == list(range(21, 121))


async def test_a_site_that_failed_is_asked_again_after_one_heartbeat_timeout(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, quorum="2", heartbeat_timeout=3)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await deliver(host, a)
    task = (await task_of(host, b)).task
    await host.federation.FailTask(pb.FailTaskRequest(session=b, task_id=task.id, kind="TaskError", reason="x"))
    failed_at = time.monotonic()
    assert (await status(host)).message.endswith("1 of at least 2 updates; failed, will be asked again: b")
    reasons = []
    while (answer := await poll(host, b, 0.1)).HasField("wait"):
        reasons.append(answer.wait.reason)
        await host.federation.Heartbeat(pb.HeartbeatRequest(session=a))
    assert time.monotonic() - failed_at >= 3
    # Sites are not told of each other.
    assert reasons[0] == "round 1 of 1: waits for its quorum: 1 of at least 2 updates"
    assert (await deliver(host, b)).accepted
    assert "asked again, as the quorum is not reached: b" in [line.message for line in (await status(host)).journal]


async def test_rejected_results_are_counted_and_the_third_one_shuts_the_site_out(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_sites=2, rounds=5)
    good, bad = await enroll(host, "good"), await enroll(host, "bad")
    for number in (1, 2, 3):
        assert not (await deliver(host, bad, np.nan)).accepted
        (site, _) = (await status(host)).sites
        assert (site.rejections, site.state) == (number, "enrolled" if number < 3 else "quarantined")
        assert "not finite" in site.last_error
        assert (await deliver(host, good)).accepted
    assert (await task_of(host, good)).task.id == "train/4/good"
    assert (await poll(host, bad)).HasField("wait")
    assert [closed.contributions for closed in host.coordinator.state.closed_rounds] == 3 * [{"good": 10}]
    said = [line.message for line in (await status(host)).journal if line.trouble]
    assert said[-1].startswith("site bad is quarantined after 3 rejected results")


async def test_what_a_site_measured_is_bounded(hosts: Callable[..., Any]) -> None:
    host = await hosts(min_evaluators=1)
    await enroll(host, "a")
    e = await enroll(host, "e", rows=0, evaluates=True)
    task = (await task_of(host, e)).task

    def measured(metrics: dict[str, tuple[float, float]], rows: int = 5) -> pb.EvaluationResult:
        sums = {name: pb.MetricSum(value_sum=total, weight=weight) for name, (total, weight) in metrics.items()}
        return pb.EvaluationResult(rows=rows, metrics=sums)

    loss = (1.0, 5.0)
    for result, words in (
        (measured({"loss": loss}, rows=2**63), "needs rows"),
        (measured({"loss": loss}, rows=0), "needs rows"),
        (measured({"loss": (1.0, 2.0**63)}), "weight"),
        (measured({"loss": (1.0, 0.0)}), "weight"),
        (measured({"loss": (1.0, np.nan)}), "weight"),
        (measured({"loss": (1e300, 5.0)}), "which no model gives"),
        (measured({"loss": (np.nan, 5.0)}), "which no model gives"),
        (measured({"loss": loss, "rouge_l": (6.0, 5.0)}), "the sum of rouge_l is 6 over 5"),
        (measured({"loss": loss, "rouge_l": (-0.1, 5.0)}), "which no model gives"),
        (measured({"accuracy": (np.inf, 5.0)}), "which no model gives"),
        (measured({}), "needs 1 to 32 metrics, it has 0"),
        (measured({f"m{number}": loss for number in range(33)}), "it has 33"),
        (measured({"Loss {x}": loss}), "no name of a metric"),
        (pb.TrainResult(), "not by a 'fedhds.v2.TrainResult'"),
    ):
        error = await refused(complete_with(host, e, task.id, result))
        assert isinstance(error, RequestError)
        assert words in str(error)
    assert not (await status(host)).evaluations
    # A metric that this version does not know is kept, within those bounds.
    sums = {"loss": (10.0, 4.0), "rouge_l": (5.0, 5.0), "accuracy": (2.0, 5.0)}
    assert (await complete_with(host, e, task.id, measured(sums))).accepted
    (evaluation,) = (await status(host)).evaluations
    assert (evaluation.round_number, evaluation.rows) == (0, 5)
    assert dict(evaluation.metrics) == {"loss": 2.5, "rouge_l": 1.0, "accuracy": 0.4}


async def test_a_poll_of_a_site_that_was_taken_over_does_not_keep_its_successor_waiting(
    hosts: Callable[..., Any],
) -> None:
    host = await hosts(min_sites=2)
    first = await enroll(host, "a")
    old = asyncio.ensure_future(poll(host, first, 3))
    await until(lambda: "a" in host.coordinator.presence._waiting)
    second = await enroll(host, "a", previous_session=first)
    new = asyncio.ensure_future(poll(host, second, 20))
    with pytest.raises(grpc.aio.AioRpcError, match="taken over"):
        await old
    await enroll(host, "b")
    assert (await asyncio.wait_for(new, 5)).task.id == "train/1/a"
