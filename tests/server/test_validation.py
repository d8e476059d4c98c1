"""What sites say is checked first: no word about an artifact deletes what the run needs, and no bad report counts."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from fedhds.errors import ArtifactError, RequestError, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_server.coordinator.uploads import owner_of
from tests.support.host import MANIFEST, Host, complete, complete_with, enroll, refused, send, start, task_of, written

CLOSED = ("train/9/a", "train/1/nobody", "select/0/a", "evaluate/0/a", "never/1/a", "", "train/1/a/b")


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    """A run of two sites."""
    made = await start(tmp_path, min_sites=2)
    yield made
    await made.stop()


async def first_round(host: Host) -> tuple[str, str, Artifact]:
    """The sessions of two sites that train, and the global adapter."""
    a, b = await enroll(host, "a"), await enroll(host, "b")
    await task_of(host, a)
    return a, b, host.coordinator.state.adapter


async def announce(host: Host, session: str, artifact: Artifact) -> None:
    """Starts an upload of `artifact`, so that it counts as one of the site's own, if its task has such a size."""
    taken = artifact.size in CODECS["float32"].sizes(MANIFEST)
    with pytest.raises(grpc.aio.AioRpcError):
        await send(host, session, b"x" * (artifact.size + 1), artifact, chunk=artifact.size + 1)
    assert host.coordinator.uploads.needs(artifact, owner_of("a")) == taken


# The last one is the adapter's own and a byte.
SIZES = [1, 5, 1 << 19, 249]


@pytest.mark.parametrize("size", SIZES)
async def test_a_closed_task_that_names_the_global_adapter_with_a_wrong_size_does_not_delete_it(
    host: Host, size: int
) -> None:
    a, _, adapter = await first_round(host)
    content, wrong = host.artifacts.path(adapter).read_bytes(), Artifact(adapter.digest, size)
    await announce(host, a, wrong)
    for task_id in CLOSED:
        for named in (wrong, adapter):
            answer = await complete(host, a, task_id, named)
            assert (answer.accepted, answer.reason) == (False, "the task is closed; its result came too late to count")
    assert host.artifacts.path(adapter).read_bytes() == content


async def test_a_late_result_that_names_the_global_adapter_does_not_delete_it(host: Host) -> None:
    a, b, adapter = await first_round(host)
    content = host.artifacts.path(adapter).read_bytes()
    await announce(host, a, Artifact(adapter.digest, adapter.size + 1))
    await host.federation.FailTask(pb.FailTaskRequest(session=a, task_id="train/1/a", kind="E", reason="r"))
    assert not (await complete(host, a, "train/1/a", Artifact(adapter.digest, adapter.size + 1))).accepted
    await host.coordinator.effects.done()
    assert host.artifacts.path(adapter).read_bytes() == content
    path, artifact = written(host, 1.0)
    await send(host, b, path.read_bytes(), artifact)
    assert (await complete(host, b, "train/1/b", artifact)).accepted


@pytest.mark.parametrize("size", SIZES)
async def test_an_open_task_that_names_the_global_adapter_with_a_wrong_size_does_not_delete_it(
    host: Host, size: int
) -> None:
    a, _, adapter = await first_round(host)
    content, wrong = host.artifacts.path(adapter).read_bytes(), Artifact(adapter.digest, size)
    await announce(host, a, wrong)
    for samples in (10, 11, 0):
        assert isinstance(await refused(complete(host, a, "train/1/a", wrong, samples)), ArtifactError)
    assert host.artifacts.path(adapter).read_bytes() == content


async def test_a_rejected_result_that_names_the_global_adapter_does_not_delete_it(host: Host) -> None:
    a, _, adapter = await first_round(host)
    content = host.artifacts.path(adapter).read_bytes()
    await announce(host, a, Artifact(adapter.digest, adapter.size + 1))
    answer = await complete(host, a, "train/1/a", adapter, samples=11)
    assert "claims 11 samples" in answer.reason
    await host.coordinator.effects.done()
    assert host.artifacts.path(adapter).read_bytes() == content


async def test_a_global_adapter_that_was_cut_is_not_deleted_for_a_site_that_names_what_is_left(host: Host) -> None:
    a, _, adapter = await first_round(host)
    path = host.artifacts.path(adapter)
    os.truncate(path, adapter.size - 1)
    content = path.read_bytes()
    error = await refused(complete(host, a, "train/1/a", Artifact(adapter.digest, adapter.size - 1)))
    assert isinstance(error, ArtifactError | StorageError)
    assert path.read_bytes() == content


async def test_a_site_cannot_delete_what_another_site_sent(host: Host) -> None:
    a, b, _ = await first_round(host)
    path, artifact = written(host, 1.0)
    await send(host, b, path.read_bytes(), artifact)
    assert not (await complete(host, a, "train/9/a", artifact)).accepted
    assert host.artifacts.has(artifact)
    assert (await complete(host, b, "train/1/b", artifact)).accepted
    # Now it counts, and stays no matter who says to have sent it.
    longer = Artifact(artifact.digest, artifact.size + 1)
    await announce(host, a, longer)
    for named in (artifact, longer):
        assert not (await complete(host, a, "train/9/a", named)).accepted
    await host.coordinator.effects.done()
    assert host.artifacts.has(artifact)


async def test_what_a_site_sent_is_deleted_when_its_task_is_closed_without_it(host: Host) -> None:
    a, _, _ = await first_round(host)
    path, artifact = written(host, 1.0)
    await send(host, a, path.read_bytes(), artifact)
    assert not (await complete(host, a, "train/9/a", artifact)).accepted
    assert host.artifacts.has(artifact)
    await host.federation.FailTask(pb.FailTaskRequest(session=a, task_id="train/1/a", kind="E", reason="r"))
    await host.coordinator.effects.done()
    assert not host.artifacts.has(artifact)


@pytest.mark.parametrize("digest", ["", "x", "../" * 20 + "evil", "A" * 64])
async def test_a_reference_that_is_none_is_refused_for_an_open_task_and_nothing_for_a_closed_one(
    host: Host, digest: str
) -> None:
    a, _, _ = await first_round(host)
    result = pb.TrainResult(samples=10, loss=1.0)
    result.update.digest, result.update.size = digest, 4
    assert isinstance(await refused(complete_with(host, a, "train/1/a", result)), ArtifactError)
    assert not (await complete_with(host, a, "train/9/a", result)).accepted


async def test_a_bad_report_is_rejected_counts_as_such_and_the_selection_goes_on(tmp_path: Path) -> None:
    host = await start(tmp_path, min_sites=2, selection_strategy="fedhds")
    a, b = await enroll(host, "a", rows=4), await enroll(host, "b", rows=4)
    await task_of(host, a)
    report = selection_pb2.ClusterReport(dimension=2, centroids=[selection_pb2.Centroid(values=[0, 1], size=5)])
    answer = await complete_with(host, a, "select/0/a", report)
    assert not answer.accepted
    assert answer.reason == "the report is rejected: its clusters do not add up to the 4 rows that it declared"
    assert host.coordinator.state.sites["a"].rejections == 1
    for other in (pb.TrainResult(), selection_pb2.KMeansStats(dimension=2)):
        assert isinstance(await refused(complete_with(host, b, "select/0/b", other)), RequestError)
    report.centroids[0].size = 4
    assert (await complete_with(host, b, "select/0/b", report)).accepted
    assert (await task_of(host, b)).task.id == "train/1/b"
    assert list(host.coordinator.state.coresets) == ["b"]
    await host.stop()
