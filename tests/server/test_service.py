"""The coordinator over real gRPC on port 0, driven by a site made of numpy."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from fedhds.errors import (
    AdapterError,
    ArtifactError,
    EnrollmentRefused,
    NameInUse,
    RequestError,
    SessionLost,
    TaskError,
)
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import status_pb2, transfer_pb2
from tests.support.host import (
    FINGERPRINT,
    MANIFEST,
    Host,
    complete,
    complete_with,
    enroll,
    refused,
    send,
    start,
    task_of,
    written,
)
from tests.support.manifests import lora_manifest


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = await start(tmp_path)
    yield made
    await made.stop()


async def test_a_whole_run_over_the_wire(host: Host) -> None:
    session = await enroll(host)
    task = (await task_of(host, session)).task
    assert (task.kind, task.round_number) == ("train", 1)
    request = pb.TrainRequest()
    assert task.request.Unpack(request)
    # All tensors train.
    assert (request.coreset.WhichOneof("rows"), list(request.trainable_roles)) == ("all", [])
    download = transfer_pb2.DownloadRequest(session=session, artifact=task.adapter)
    content = b"".join([message.chunk async for message in host.federation.Download(download)])
    assert hashlib.sha256(content).hexdigest() == task.adapter.digest
    assert len(content) == task.adapter.size
    path, artifact = written(host, 0.5)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    done = (await task_of(host, session)).done
    assert done.outcome == "completed"
    assert '"r": 2' in done.adapter_config
    assert done.adapter.digest == artifact.digest
    for _ in range(2):
        # The answer may be lost: the coordinator is there until the site has gone.
        await host.federation.ConfirmDelivery(pb.ConfirmDeliveryRequest(session=session))
    assert host.coordinator.state.sites["a"].delivered
    await host.federation.Leave(pb.LeaveRequest(session=session))
    await asyncio.wait_for(host.work, 10)
    with AdapterReader(host.folder / "checkpoint" / "adapter_model.safetensors", MANIFEST) as reader:
        assert (reader.tensor(MANIFEST.tensors[0]) == 0.5).all()
    # The update is gone; the initial adapter stays for evaluators, the last one for sites.
    assert len(list((host.folder / "artifacts").iterdir())) == 2


async def test_an_upload_resumes_and_repeats(host: Host) -> None:
    session = await enroll(host)
    await task_of(host, session)
    path, artifact = written(host, 0.25)
    content = path.read_bytes()
    error = await refused(send(host, session, content[:100], artifact))
    assert "ended after 100" in str(error)
    request = transfer_pb2.GetUploadRequest(session=session, artifact=artifact.to_proto())
    assert (await host.federation.GetUpload(request)).offset == 100
    assert "ask where it stands" in str(await refused(send(host, session, content, artifact, offset=150)))
    await send(host, session, content, artifact, offset=60)
    assert (await host.federation.GetUpload(request)).offset == artifact.size
    await send(host, session, content, artifact)
    other = Artifact(artifact.digest[::-1], artifact.size)
    assert "another digest" in str(await refused(send(host, session, content, other)))
    for size in (1, 1 << 40):
        odd = Artifact("0" * 64, size)
        assert "none of this task's, which has" in str(await refused(send(host, session, content, odd)))
    # One upload at a time: this one takes the place of what was sent under another digest.
    longer = Artifact("0" * 64, artifact.size)
    assert "longer" in str(await refused(send(host, session, content + b"x", longer)))
    assert {path.name[:64] for path in host.artifacts.folder.glob("*.part")} <= {longer.digest}


@pytest.mark.parametrize(
    ("value", "samples", "loss", "words"),
    [
        (np.nan, 10, 1.0, "not finite"),
        (0.5, 11, 1.0, "claims 11 samples"),
        (0.5, 0, 1.0, "claims 0 samples"),
        (0.5, 10, np.inf, "loss is inf"),
        (0.5, 10, np.nan, "loss is nan"),
        (0.5, 10, 1e308, "no model gives"),
    ],
)
async def test_a_bad_update_is_rejected_with_its_reason_and_the_round_goes_on(
    host: Host, value: float, samples: int, loss: float, words: str
) -> None:
    session = await enroll(host)
    task = (await task_of(host, session)).task
    path, artifact = written(host, value)
    await send(host, session, path.read_bytes(), artifact)
    answer = await complete(host, session, task.id, artifact, samples, loss)
    assert (answer.accepted, answer.rejected) == (False, True)
    assert words in answer.reason
    # A site whose answer was lost hears the same.
    assert await complete(host, session, task.id, artifact, samples, loss) == answer
    assert words in host.coordinator.state.sites["a"].last_error
    assert not host.artifacts.has(artifact)


async def test_an_update_of_other_shapes_is_rejected(host: Host) -> None:
    session = await enroll(host)
    task = (await task_of(host, session)).task
    path = host.folder / "other"
    manifest = lora_manifest({"q.lora_A.weight": (3, 4), "q.lora_B.weight": (4, 2)})
    artifact = write_adapter(path, manifest, lambda t: np.zeros(t.shape, np.float32), "float32")
    await send(host, session, path.read_bytes(), artifact)
    assert "q.lora_A.weight has shape (3, 4)" in (await complete(host, session, task.id, artifact)).reason


async def test_results_of_closed_or_foreign_tasks(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    task = (await task_of(host, a)).task
    path, artifact = written(host, 0.5)
    assert isinstance(await refused(complete(host, a, task.id, artifact)), ArtifactError)
    await send(host, a, path.read_bytes(), artifact)
    assert isinstance(await refused(complete(host, b, task.id, artifact)), TaskError)
    wrong = await refused(complete_with(host, a, task.id, pb.EvaluationResult()))
    assert isinstance(wrong, RequestError)
    assert "completed by a fedhds.v2.TrainResult, not by a 'fedhds.v2.EvaluationResult'" in str(wrong)
    assert isinstance(
        await refused(host.federation.CompleteTask(pb.CompleteTaskRequest(session=a, task_id=task.id))), RequestError
    )
    assert (await complete(host, a, task.id, artifact)).accepted
    # A site whose answer was lost asks again; that must not delete what was accepted.
    assert (await complete(host, a, task.id, artifact)).accepted
    assert host.artifacts.has(artifact)
    for closed in ("train/1/c", "train/2/a", "evaluate/0/a", "select/0/a", "never/1/a", ""):
        late = await complete(host, a, closed, artifact)
        assert (late.accepted, late.reason) == (False, "the task is closed; its result came too late to count")
        assert not late.rejected
    early = host.federation.ConfirmDelivery(pb.ConfirmDeliveryRequest(session=a))
    assert isinstance(await refused(early), TaskError)
    await host.stop()


async def test_a_restart_on_the_same_folder_goes_on_and_sessions_stay(tmp_path: Path) -> None:
    first = await start(tmp_path, min_sites=2)
    a, b = await enroll(first, "a"), await enroll(first, "b")
    task = (await task_of(first, a)).task
    path, artifact = written(first, 0.5)
    await send(first, a, path.read_bytes(), artifact)
    assert (await complete(first, a, task.id, artifact)).accepted
    await first.stop()
    second = await start(tmp_path)
    assert (await task_of(second, b)).task.id == "train/1/b"
    await send(second, b, path.read_bytes(), artifact)
    assert (await complete(second, b, "train/1/b", artifact)).accepted
    assert (await task_of(second, a)).done.outcome == "completed"
    assert second.coordinator.state.closed_rounds[0].contributions == {"a": 10, "b": 10}
    await second.stop()


async def test_sessions(host: Host) -> None:
    session = await enroll(host)
    assert isinstance(await refused(host.federation.NextTask(pb.NextTaskRequest(session="x"))), SessionLost)
    assert isinstance(await refused(enroll(host)), NameInUse)
    successor = await enroll(host, previous_session=session)
    assert isinstance(await refused(host.federation.Heartbeat(pb.HeartbeatRequest(session=session))), SessionLost)
    answer = await host.federation.Heartbeat(pb.HeartbeatRequest(session=successor, task_id="train/9/a"))
    assert answer.withdrawn
    await host.federation.Leave(pb.LeaveRequest(session=successor))
    await enroll(host)


async def test_an_enrollment_whose_answer_was_lost_can_be_repeated(host: Host) -> None:
    request = pb.EnrollRequest(site="a", protocol_versions=[2], session="ab" * 32)
    answers = [await host.federation.Enroll(request) for _ in range(2)]
    assert [answer.session for answer in answers] == ["ab" * 32] * 2
    request.session = "cd" * 32
    assert isinstance(await refused(host.federation.Enroll(request)), NameInUse)


async def test_another_model_is_refused_and_frees_the_name(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    await enroll(host, "a")
    session = (await host.federation.Enroll(pb.EnrollRequest(site="b", protocol_versions=[2]))).session
    request = pb.RegisterRequest(session=session, fingerprint=FINGERPRINT, manifest=MANIFEST.to_proto(), rows=1)
    request.fingerprint.weights = "other"
    assert isinstance(await refused(host.federation.Register(request)), RequestError)
    request.fingerprint.weights = "f" * 64
    error = await refused(host.federation.Register(request))
    assert isinstance(error, EnrollmentRefused)
    assert "the weights differs" in str(error)
    await enroll(host, "b")
    await host.stop()


async def test_a_site_that_ends_tells_why_and_status_journal_and_log_have_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = await start(tmp_path, min_sites=2)
    session = (await host.federation.Enroll(pb.EnrollRequest(site="a", protocol_versions=[2]))).session
    leave = pb.LeaveRequest(session=session, kind="ModelError", reason="no such module\x1b; the operator sets it")
    await host.federation.Leave(leave)
    status = await host.operations.GetStatus(status_pb2.GetStatusRequest())
    (site,) = status.sites
    assert (site.state, site.last_error[:26]) == ("left", "ModelError: no such module")
    assert "\x1b" not in site.last_error
    assert status.message.endswith(f"last failures: site a: {site.last_error}")
    assert [line.message for line in status.journal if line.trouble] == [f"site a left: {site.last_error}"]
    assert f"site a left: {site.last_error}" in caplog.text
    # One that somebody stopped has no failure to tell.
    session = (await host.federation.Enroll(pb.EnrollRequest(site="b", protocol_versions=[2]))).session
    await host.federation.Leave(pb.LeaveRequest(session=session))
    assert host.coordinator.state.sites["b"].last_error == ""
    await host.stop()


async def test_a_refused_enrollment_is_in_the_log(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    await enroll(host)
    await refused(enroll(host))
    assert "refused to enroll: another process is enrolled as 'a'" in caplog.text


async def test_a_manifest_that_is_none_is_refused(host: Host) -> None:
    session = (await host.federation.Enroll(pb.EnrollRequest(site="b", protocol_versions=[2]))).session
    for manifest in (
        pb.AdapterManifest(),
        pb.AdapterManifest(tensors=[pb.TensorSpec(name="q.lora_A.weight", shape=[1, 1])], config="{}"),
        pb.AdapterManifest(tensors=MANIFEST.to_proto().tensors, config="[]"),
    ):
        request = pb.RegisterRequest(session=session, fingerprint=FINGERPRINT, manifest=manifest, rows=1)
        assert isinstance(await refused(host.federation.Register(request)), (AdapterError, ArtifactError))


async def test_a_manifest_beyond_the_runs_adapter_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    host = await start(tmp_path, max_adapter_size=1)
    session = (await host.federation.Enroll(pb.EnrollRequest(site="b", protocol_versions=[2]))).session
    vast = lora_manifest({"q.lora_A.weight": (1, 1 << 30), "q.lora_B.weight": (4, 1)})
    large = lora_manifest({"q.lora_A.weight": (2, 1 << 17), "q.lora_B.weight": (4, 2)})
    for manifest, words in ((vast, "not (2, in)"), (large, "the adapter takes 1.0 MiB, the run allows 1")):
        request = pb.RegisterRequest(session=session, fingerprint=FINGERPRINT, manifest=manifest.to_proto(), rows=1)
        error = await refused(host.federation.Register(request))
        assert isinstance(error, AdapterError)
        assert words in str(error)
    assert not host.coordinator.state.manifest
    await task_of(host, await enroll(host, "a"))
    assert host.coordinator.state.adapter_manifest == MANIFEST
    await host.stop()


async def test_a_silent_site_is_lost_and_comes_back_with_a_sign_of_life(tmp_path: Path) -> None:
    host = await start(tmp_path, heartbeat_timeout=0.3, rounds=5, min_sites=2)
    a, b = await enroll(host, "a"), await enroll(host, "b")
    while host.coordinator.state.sites["b"].state != "lost":
        await host.federation.Heartbeat(pb.HeartbeatRequest(session=a))
        await asyncio.sleep(0.05)
    await host.federation.Heartbeat(pb.HeartbeatRequest(session=b))
    assert host.coordinator.state.sites["b"].state == "enrolled"
    await host.stop()


async def test_status_tells_the_run(host: Host) -> None:
    await enroll(host, rows=7, evaluates=True)
    async with asyncio.timeout(20):
        while (status := await host.operations.GetStatus(status_pb2.GetStatusRequest())).phase != "training":  # noqa: ASYNC110 - the server says so when it is asked
            await asyncio.sleep(0.01)
    assert (status.sites[0].site, status.sites[0].rows, status.pool_rows) == ("a", 7, 7)
    spec = RunSpec.model_validate_json(status.spec)
    assert spec == host.coordinator.state.spec
    assert spec.model.name == "m"
    assert status.round_number == 1
    assert (status.cohort.task, status.cohort.working, status.cohort.target) == ("train", 1, 1)
    assert list(status.protocol_versions) == [2]


async def test_wakes_a_long_poll_at_once(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2)
    a = await enroll(host, "a")
    poll = asyncio.ensure_future(host.federation.NextTask(pb.NextTaskRequest(session=a, wait_s=20)))
    await asyncio.sleep(0.1)
    assert not poll.done()
    await enroll(host, "b")
    request = pb.TrainRequest()
    assert (await asyncio.wait_for(poll, 5)).task.request.Unpack(request)
    assert request.coreset.HasField("all")
    await host.stop()


async def test_a_site_whose_upload_takes_long_to_be_kept_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    host = await start(tmp_path, heartbeat_timeout=1.5)
    session = await enroll(host)
    task = (await task_of(host, session)).task
    finish = host.artifacts.finish

    def slowly(artifact: Artifact, owner: str) -> None:
        time.sleep(4)
        finish(artifact, owner)

    monkeypatch.setattr(host.artifacts, "finish", slowly)
    path, artifact = written(host, 0.5)
    await send(host, session, path.read_bytes(), artifact)
    assert (await complete(host, session, task.id, artifact)).accepted
    assert "is lost" not in caplog.text
    await host.stop()
