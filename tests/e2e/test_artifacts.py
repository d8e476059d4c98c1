"""Runs whose artifacts lie in S3, whose updates are int8 or kept, and artifacts of gigabytes, by real processes."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedhds.spec import RunSpec
from fedhds.spec.peft import MAX_FEATURES
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_server.run.state import RunState, packed
from fedhds_server.storage.sql import SqlStore
from tests.support.federation import Federation, free_port
from tests.support.manifests import lora_manifest
from tests.support.s3 import Bucket, s3_server
from tests.support.tiny import logits, write_rows

pytestmark = pytest.mark.e2e

SIZE = 3 << 30
CHUNK = 1 << 20


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Bucket]:
    with s3_server(tmp_path) as made:
        yield made


def shards(folder: Path) -> dict[str, Path]:
    return {name: write_rows(folder / f"{name}.jsonl", {name: 8}) for name in "ab"}


def adapter_of(federation: Federation, run: str) -> bytes:
    return (federation.folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes()


def finished(federation: Federation, *flags: object, run: str) -> dict[str, float]:
    """Runs it to its end; megabytes that each site sent."""
    server = federation.server("--rounds=3", "--selection-strategy=full", "--learning-rate=0.01", *flags, run=run)
    address = federation.address(run)
    sites = {
        name: federation.client(f"{name}-{run}", f"--data={path}", f"--name={name}", server=address)
        for name, path in shards(federation.folder).items()
    }
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites.values()] == [0, 0], "\n".join(site.text for site in sites.values())
    return {name: float(re.findall(r"sent ([\d.]+) MB", site.text)[0]) for name, site in sites.items()}


def test_a_run_on_s3_outlives_its_coordinators_disk_and_gives_the_same_adapter(
    federation: Federation, bucket: Bucket
) -> None:
    folder = federation.folder
    finished(federation, "--keep-updates", run="local")
    federation.environment = bucket.environment
    listen = f"127.0.0.1:{free_port()}"
    flags = (
        "--rounds=3",
        "--selection-strategy=full",
        "--learning-rate=0.01",
        "--keep-updates",
        f"--artifacts={bucket.url}",
    )
    server = federation.server(*flags, run="remote", listen=listen)
    sites = [
        federation.client(name, f"--data={path}", f"--name={name}", server=listen)
        for name, path in shards(folder).items()
    ]
    server.wait_for("round 1 closed")
    server.kill()
    shutil.rmtree(folder / "remote" / "spool")
    server = federation.server(*flags, run="remote", listen=listen)
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0, 0], "\n".join(site.text for site in sites)
    assert adapter_of(federation, "remote") == adapter_of(federation, "local")
    names = [f"updates/round-{number}/{site}.safetensors" for number in (1, 2, 3) for site in "ab"]
    kept = folder / "local" / "artifacts"
    assert sorted(str(path.relative_to(kept)) for path in kept.rglob("*/*/*")) == names
    found = {name.partition("/")[2]: bucket.read(name) for name in bucket.objects() if "/updates/" in name}
    assert found == {name: (kept / name).read_bytes() for name in names}
    for daemon in federation.daemons:
        assert bucket.environment["AWS_SECRET_ACCESS_KEY"] not in daemon.text
        assert "Traceback" not in daemon.text


def test_a_store_that_cannot_be_used_is_said_at_once(federation: Federation, bucket: Bucket) -> None:
    federation.environment = bucket.environment
    for url, status, words in (
        ("s3://nobody-made-this/runs", 1, "there is no such bucket; make it"),
        ("s3://key:secret@federation/runs", 2, "credentials and options do not belong into the URL"),
        ("nonsense://federation", 2, "no protocol that fsspec knows"),
    ):
        flags = federation.server_flags("--rounds=1", f"--artifacts={url}")
        server = federation.start("server", "fedhds-server", *flags)
        assert server.wait() == status
        assert words in server.text
        assert "Traceback" not in server.text


def test_a_run_with_int8_updates_sends_less_and_ends_with_an_adapter_that_peft_loads(federation: Federation) -> None:
    from safetensors.numpy import load_file

    finished(federation, "--keep-updates", run="plain")
    finished(federation, "--keep-updates", "--wire-dtype=int8", run="int8")
    sizes = {}
    for run in ("plain", "int8"):
        files = sorted((federation.folder / run / "artifacts" / "updates").rglob("*.safetensors"))
        assert len(files) == 6
        sizes[run] = sum(len(load.tobytes()) for file in files for load in load_file(file).values())
    # The model is tiny: 32 values to a scale. Headers, longer than its tensors, are left out.
    assert sizes["int8"] / sizes["plain"] < 0.25 + 1 / 32 + 0.01
    adapters = {run: load_file(federation.folder / run / "checkpoint" / "adapter_model.safetensors") for run in sizes}
    assert {tensor.dtype.name for tensor in adapters["int8"].values()} == {"float32"}
    off, whole = (
        sum(float(np.square(values).sum()) for values in tensors)
        for tensors in (
            [plain - adapters["int8"][name] for name, plain in adapters["plain"].items()],
            adapters["plain"].values(),
        )
    )
    assert math.sqrt(off / whole) < 0.05
    trained = logits(federation.model, federation.folder / "int8" / "checkpoint")
    assert trained == logits(federation.model, federation.folder / "out" / "a-int8")
    assert trained == pytest.approx(logits(federation.model, federation.folder / "plain" / "checkpoint"), abs=0.05)


def peak_memory(pid: int) -> int:
    """Most bytes that a process has ever had in memory."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) << 10


@pytest.mark.large
@pytest.mark.long
async def test_an_artifact_of_three_gib_goes_both_ways_in_bounded_memory(federation: Federation) -> None:
    folder = federation.folder / "run"
    if shutil.disk_usage(federation.folder).free < 2 * SIZE:
        pytest.skip("needs 6 GiB of free disk")
    # A global adapter of zeros that takes no room on disk, as the first site would have had it drawn.
    (folder / "artifacts").mkdir(parents=True)
    sparse = folder / "artifacts" / "sparse"
    sparse.touch()
    os.truncate(sparse, SIZE)
    adapter = Artifact.of_file(sparse)
    sparse.rename(folder / "artifacts" / adapter.digest)
    rank = SIZE // (2 * 4 * MAX_FEATURES)
    manifest = lora_manifest({"q.lora_A.weight": (rank, MAX_FEATURES), "q.lora_B.weight": (MAX_FEATURES, rank)})
    spec = RunSpec.of(
        model=str(federation.model),
        rounds=1,
        selection_strategy="full",
        min_sites=1,
        max_length=256,
        max_new_tokens=4,
        lora_rank=rank,
        max_adapter_size=4096,
    )
    known = dict.fromkeys(("weights", "config", "tokenizer", "template"), "ab" * 32) | {"feature_model": ""}
    fingerprint = pb.ModelFingerprint(**known)
    state = RunState(run_id="r", spec=spec, fingerprint=known, manifest=packed(manifest.to_proto()))
    state.adapters[0] = adapter
    store = SqlStore.in_folder(folder)
    store.acquire("test", "", 60)
    store.save(state)
    store.release()
    store.close()
    # A fork would begin with the memory of all programs.
    federation.installed = True
    flags = (f"--lora-rank={rank}", "--selection-strategy=full", "--min-sites=1", "--max-adapter-size=4096")
    server = federation.server("--rounds=1", *flags)
    pattern = os.urandom(CHUNK)
    digest = hashlib.sha256()
    for _ in range(SIZE // CHUNK):
        digest.update(pattern)
    # The header of an update comes on top of its tensors.
    rest = CODECS["float32"].sizes(manifest).start - SIZE
    assert 0 < rest < CHUNK
    digest.update(pattern[:rest])
    update = Artifact(digest.hexdigest(), SIZE + rest)

    async def parts() -> AsyncIterator[transfer_pb2.UploadRequest]:
        yield transfer_pb2.UploadRequest(header=transfer_pb2.UploadHeader(session=session, artifact=update.to_proto()))
        message = transfer_pb2.UploadRequest(chunk=pattern)
        for _ in range(SIZE // CHUNK):
            yield message
        yield transfer_pb2.UploadRequest(chunk=pattern[:rest])

    started = time.monotonic()
    async with grpc.aio.insecure_channel(federation.address()) as channel:
        federating = rpc.FederationStub(channel)
        session = (await federating.Enroll(pb.EnrollRequest(site="a", protocol_versions=[2]))).session
        registration = pb.RegisterRequest(
            session=session, fingerprint=fingerprint, manifest=manifest.to_proto(), rows=9
        )
        await federating.Register(registration)
        # Uploads need an open task.
        while not (await federating.NextTask(pb.NextTaskRequest(session=session, wait_s=5))).HasField("task"):
            pass
        before = peak_memory(server.process.pid)
        await federating.Upload(parts())
        held = await federating.GetUpload(transfer_pb2.GetUploadRequest(session=session, artifact=update.to_proto()))
        assert held.offset == update.size
        digest, received = hashlib.sha256(), 0
        async for message in federating.Download(
            transfer_pb2.DownloadRequest(session=session, artifact=adapter.to_proto())
        ):
            received += len(message.chunk)
            await asyncio.to_thread(digest.update, message.chunk)
    assert (digest.hexdigest(), received) == (adapter.digest, SIZE)
    grown = peak_memory(server.process.pid) - before
    print(f"3 GiB up and down in {time.monotonic() - started:.1f} s; the coordinator's peak grew by {grown >> 20} MiB")
    assert grown < 256 << 20
