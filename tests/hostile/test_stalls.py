"""A site that is alive and answers nothing: rounds, the final evaluation and the end of the run go on without it."""

from __future__ import annotations

import threading
from contextlib import suppress

import grpc
import pytest

from fedhds.v2 import federation_pb2 as pb
from tests.hostile.conftest import Secured, Undisturbed

pytestmark = pytest.mark.e2e

# An honest site's work takes a second of it.
TIMEOUT_S = 15


@pytest.mark.long
def test_a_site_that_heartbeats_and_never_answers_stalls_nothing(secured: Secured, undisturbed: Undisturbed) -> None:
    federation = secured("--rounds=1", "--min-sites=3", "--min-evaluators=1", f"--task-timeout={TIMEOUT_S}")
    idler = federation.attacker("idler")
    idler.enroll()
    idler.register(evaluates=True)
    federation.open_gate()
    over, tasks = threading.Event(), set()

    def idle() -> None:
        """Lives on, claims to be nearly done, and takes every task; it never asks for the final adapter."""
        # Until the coordinator ends.
        with suppress(grpc.RpcError):
            while not over.is_set():
                answer = idler.stub.NextTask(pb.NextTaskRequest(session=idler.session, wait_s=0))
                if answer.HasField("task"):
                    tasks.add(answer.task.id)
                for task in tasks:
                    idler.stub.Heartbeat(pb.HeartbeatRequest(session=idler.session, task_id=task, progress=0.99))
                over.wait(0.5)

    thread = threading.Thread(target=idle)
    thread.start()
    try:
        assert federation.coordinator.wait() == 0, federation.coordinator.text
    finally:
        over.set()
        thread.join()
    federation.finish()
    assert {"evaluate/0/idler", "train/1/idler"} <= tasks
    assert sorted(federation.state.failed_evaluations) == ["evaluate/0/idler", "evaluate/1/idler"]
    for kind in ("train", "evaluate"):
        words = f"site idler failed its {kind} task: no progress for {TIMEOUT_S} s, the run's --task-timeout"
        assert words in federation.coordinator.text
    assert federation.state.closed_rounds[0].contributions == {"a": 8, "b": 8}
    assert federation.adapter == undisturbed("--rounds=1")
