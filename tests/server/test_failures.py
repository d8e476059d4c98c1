"""What no retry would change ends the run as failed, and never the process, now or at the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedhds.errors import AdapterError
from fedhds.v2 import selection_pb2
from fedhds_server.aggregation import AGGREGATORS, Aggregator
from fedhds_server.aggregation.fedavg import FedAvg
from fedhds_server.run.activity import activity
from fedhds_server.selection import STRATEGIES, InterClientSelection, Report, SelectionContext
from fedhds_server.selection.random import Random
from tests.support.host import Host, complete, complete_with, enroll, send, start, task_of, written


class Failing(InterClientSelection):
    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Any:
        raise ValueError("what a library says, with data in it")


class FailingMean(FedAvg):
    def combine(self, *_: Any) -> Any:
        raise AdapterError("q.lora_A.weight cannot be combined")


class Empty(FedAvg):
    def combine(self, parameters: Any, group: Any, current: Any, shares: Any, update: Any) -> Any:
        return [np.full(tensor.shape, np.nan, np.float32) for tensor in group]


class Adding(Random):
    def add(self, totals: Any, report: Any) -> Any:
        raise OverflowError("too large")


async def failed(host: Host, session: str, reason: str, folder: Path) -> None:
    """The run has failed for `reason`, and so it has when the coordinator is started again."""
    done = (await asyncio.wait_for(task_of(host, session), 20)).done
    assert (done.outcome, done.message) == ("failed", reason)
    assert not host.work.done()
    await host.stop()
    again = await start(folder)
    assert activity(again.coordinator.state) == "failed"
    assert again.coordinator.state.message == reason
    assert (await task_of(again, session)).done.outcome == "failed"
    await asyncio.wait_for(again.coordinator.effects.done(), 20)
    assert not again.work.done()
    await again.stop()


async def test_a_strategy_that_raises_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(STRATEGIES, "random", Failing())
    host = await start(tmp_path, selection_strategy="random")
    session = await enroll(host)
    reason = (
        "the selection strategy random (stage select/0) failed: ValueError; the coordinator's log has the traceback"
    )
    await failed(host, session, reason, tmp_path)
    # The text may hold data: it is for the log alone.
    assert "what a library says" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("aggregator", "words"),
    [
        (FailingMean(), "q.lora_A.weight cannot be combined"),
        (Empty(), "q.lora_A.weight has values that are not finite"),
    ],
)
async def test_an_aggregator_that_raises_or_gives_no_numbers_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, aggregator: Aggregator, words: str
) -> None:
    monkeypatch.setitem(AGGREGATORS, "fedavg", aggregator)
    host = await start(tmp_path)
    session = await enroll(host)
    task = (await task_of(host, session)).task
    path, artifact = written(host, 0.5)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    reason = (
        f"the aggregator fedavg with the server optimizer none (stage train/1) failed: {words}; the coordinator's log "
        "has the traceback"
    )
    await failed(host, session, reason, tmp_path)


async def test_a_result_on_which_the_strategy_raises_fails_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STRATEGIES, "fedhds", Adding())
    host = await start(tmp_path, selection_strategy="fedhds")
    session = await enroll(host)
    task = (await task_of(host, session)).task
    with pytest.raises(grpc.aio.AioRpcError, match="internal error"):
        await complete_with(host, session, task.id, selection_pb2.ClusterReport())
    reason = "the event ResultReceived failed: OverflowError; the coordinator's log has the traceback"
    await failed(host, session, reason, tmp_path)
