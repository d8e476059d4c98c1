"""Messages that are too long for a call, over real gRPC: what they say counts as if it had come in one message."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from fedhds.errors import ArtifactError, RequestError
from fedhds.long_messages import artifact_of, long_message
from fedhds.privacy.ledger import Ledger
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import transfer_pb2
from fedhds.v2.selection_pb2 import KMeansCenters, KMeansStats
from fedhds_client.features.extraction import Features
from fedhds_client.selection import STRATEGIES, SelectionContext
from fedhds_client.selection.private_reporter import PrivateReporter
from tests.support.host import Host, complete_with, enroll, refused, send, start, task_of

ROWS, BUDGET, DIMENSION = 40, 12, 4
SETTINGS: dict[str, Any] = {
    "selection_strategy": "federated-kmeans",
    "selection_budget": str(BUDGET),
    "feature_dimension": DIMENSION,
    "kmeans_iterations": 1,
    "min_sites": 2,
}
NAMES = ("a", "b")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three centers are too long for a call."""
    monkeypatch.setattr("fedhds_server.workflows.selection.MAX_INLINE", 100)


def features(name: str) -> Features:
    values = np.random.default_rng(NAMES.index(name)).normal(size=(ROWS, DIMENSION))
    return Features(np.arange(ROWS), (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32))


async def download(host: Host, session: str, artifact: Artifact) -> bytes:
    request = transfer_pb2.DownloadRequest(session=session, artifact=artifact.to_proto())
    return b"".join([message.chunk async for message in host.federation.Download(request)])


async def request_of(host: Host, session: str, task: pb.Task) -> KMeansCenters | None:
    """The centers that a task asks about, however they came."""
    if not task.HasField("request"):
        return None
    request, centers = task.request, KMeansCenters()
    if artifact := artifact_of(request):
        request = long_message(await download(host, session, artifact))
    assert request.Unpack(centers)
    return centers


async def report_of(host: Host, session: str, name: str, task: pb.Task) -> Message:
    folder = host.folder / f"site-{name}"
    folder.mkdir(exist_ok=True)
    spec = host.coordinator.state.spec
    account = Ledger(folder / "ledger.db").account(name, lambda: [name.encode()])
    reporter = PrivateReporter(name, folder, account, "r", spec, allow_exact_kmeans_sums=True)
    request = await request_of(host, session, task)
    context = SelectionContext(task.id, spec, ROWS, lambda: features(name), reporter, request)
    return STRATEGIES["federated-kmeans"].report(context)


async def answer(host: Host, session: str, task: pb.Task, content: bytes) -> pb.CompleteTaskResponse:
    """Uploads `content` as a long result, and completes the task with it."""
    path = host.folder / "content"
    path.write_bytes(content)
    artifact = Artifact.of_file(path)
    await send(host, session, content, artifact, chunk=1000)
    return await complete_with(host, session, task.id, transfer_pb2.LongMessage(artifact=artifact.to_proto()))


def whole(message: Message) -> bytes:
    wrapped = AnyMessage()
    wrapped.Pack(message)
    return wrapped.SerializeToString()


async def only_what_is_needed(host: Host) -> None:
    """Returns once the store has nothing that the run does not need."""
    needed = {artifact.digest for artifact in host.coordinator.state.artifacts}
    while True:
        if {path.name for path in host.artifacts.folder.iterdir()} == needed:
            return
        await asyncio.sleep(0.01)


async def selected(folder: Path) -> tuple[dict[str, list[tuple[int, int]]], int]:
    """The picks of a whole selection, and how many of its steps had a long request."""
    folder.mkdir()
    host = await start(folder, **SETTINGS)
    sessions = {name: await enroll(host, name, rows=ROWS) for name in NAMES}
    long_steps = 0
    while True:
        tasks = {name: (await task_of(host, session)).task for name, session in sessions.items()}
        if tasks["a"].kind != "select":
            break
        long = artifact_of(tasks["a"].request) is not None
        long_steps += long
        for name, task in tasks.items():
            report = await report_of(host, sessions[name], name, task)
            if long:
                taken = await answer(host, sessions[name], task, whole(report))
            else:
                taken = await complete_with(host, sessions[name], task.id, report)
            assert taken.accepted, taken.reason
    state = host.coordinator.state
    # The state has references only, and what a step needed goes with it.
    assert len(state.model_dump_json()) < 20_000
    await only_what_is_needed(host)
    picks = {
        name: [(pick.cluster_id, pick.count) for pick in state.coreset_of(name).picks.clusters]
        for name in state.coresets
    }
    await host.stop()
    return picks, long_steps


async def test_a_selection_with_long_messages_gives_the_same_coresets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picks, steps = await selected(tmp_path / "inline")
    assert (set(picks), steps) == ({"a", "b"}, 0)
    monkeypatch.setattr("fedhds_server.workflows.selection.MAX_INLINE", 100)
    same, steps = await selected(tmp_path / "long")
    assert same == picks
    assert steps > 2


async def long_task(host: Host, sessions: dict[str, str]) -> pb.Task:
    """The first task of site a that has a long request."""
    while True:
        tasks = {name: (await task_of(host, session)).task for name, session in sessions.items()}
        if artifact_of(tasks["a"].request):
            return tasks["a"]
        for name, task in tasks.items():
            report = await report_of(host, sessions[name], name, task)
            assert (await complete_with(host, sessions[name], task.id, report)).accepted


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff" * 50, "holds no message"),
        (whole(KMeansStats(dimension=DIMENSION)), "do not add up to the 40 rows"),
        (whole(KMeansStats(dimension=0)), "its sums have 0 values"),
        (whole(pb.TrainResult(samples=3)), "takes a fedhds.v2.KMeansStats"),
        (whole(transfer_pb2.LongMessage()), "takes a fedhds.v2.KMeansStats"),
    ],
)
async def test_a_long_report_that_cannot_be_right_is_rejected_and_goes(
    tmp_path: Path, content: bytes, words: str
) -> None:
    host = await start(tmp_path, **SETTINGS)
    sessions = {name: await enroll(host, name, rows=ROWS) for name in NAMES}
    task = await long_task(host, sessions)
    taken = await answer(host, sessions["a"], task, content)
    assert (taken.accepted, taken.rejected) == (False, True)
    assert words in taken.reason
    assert host.coordinator.state.sites["a"].rejections == 1
    await only_what_is_needed(host)
    await host.stop()


@pytest.mark.usefixtures("short")
async def test_a_long_request_is_not_answered_in_one_message_nor_by_an_upload_beyond_its_size(tmp_path: Path) -> None:
    host = await start(tmp_path, **SETTINGS)
    sessions = {name: await enroll(host, name, rows=ROWS) for name in NAMES}
    task = await long_task(host, sessions)
    vast = Artifact("0" * 64, 1 << 30)
    assert isinstance(await refused(send(host, sessions["a"], b"", vast)), ArtifactError)
    taken = await complete_with(host, sessions["a"], task.id, await report_of(host, sessions["a"], "a", task))
    assert taken.rejected
    assert "did not come as an upload" in taken.reason
    # The request is for sites that are in the run, and goes with its step.
    request = artifact_of(task.request)
    assert request is not None
    assert await download(host, sessions["b"], request)
    await host.stop()


async def test_other_tasks_have_no_long_results(tmp_path: Path) -> None:
    host = await start(tmp_path, min_evaluators=1, evaluate_every=1)
    trainer, evaluator = await enroll(host, "a"), await enroll(host, "e", rows=0, evaluates=True)
    reference = transfer_pb2.LongMessage(artifact=Artifact("0" * 64, 10).to_proto())
    for session in (trainer, evaluator):
        task = (await task_of(host, session)).task
        assert isinstance(await refused(complete_with(host, session, task.id, reference)), RequestError)
        assert task.id in host.coordinator.state.tasks
    await host.stop()
