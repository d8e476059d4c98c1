"""A coordinator over real gRPC in the test's process, and a site made of numpy that asks it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from fedhds.grpc_errors import error_of
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import status_pb2, transfer_pb2
from fedhds.v2 import status_pb2_grpc as status_rpc
from fedhds_server.coordinator import Coordinator
from fedhds_server.rpc.federation import FederationServicer
from fedhds_server.rpc.grpc_server import new_server
from fedhds_server.rpc.operations import OperationsServicer
from fedhds_server.rpc.protocol_1 import Protocol1Handler
from fedhds_server.run.state import RunState
from fedhds_server.storage.artifacts import ArtifactStore
from fedhds_server.storage.sql import SqlStore
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)}, '{"r": 2}')


FINGERPRINT = pb.ModelFingerprint(
    **{part: digit * 64 for part, digit in zip(("weights", "config", "tokenizer", "template"), "1234", strict=True)}
)


@dataclass
class Host:
    """A coordinator in this process."""

    folder: Path
    coordinator: Coordinator
    artifacts: ArtifactStore
    work: asyncio.Task[None]
    server: grpc.aio.Server
    channel: grpc.aio.Channel
    federation: Any
    operations: Any

    async def stop(self) -> None:
        self.work.cancel()
        await asyncio.gather(self.work, return_exceptions=True)
        await self.channel.close()
        await self.server.stop(None)


async def start(folder: Path, **fields: object) -> Host:
    """A coordinator on `folder`; goes on with what is there."""
    store = SqlStore.in_folder(folder)
    values = {
        "model": "m",
        "rounds": 1,
        "min_sites": 1,
        "selection_strategy": "full",
        "evaluate_every": 0,
        "lora_rank": 2,
    }
    values |= fields
    state = store.load() or RunState(run_id="r", spec=RunSpec.of(**values))
    assert store.acquire("test", "", 60.0)
    store.save(state)
    artifacts = ArtifactStore(folder / "artifacts", largest_upload=1 << 20)
    coordinator = Coordinator(state, store=store, artifacts=artifacts, folder=folder)
    server = new_server(lambda: coordinator)
    FederationServicer(lambda: coordinator).register(server)
    status_rpc.add_OperationsServicer_to_server(OperationsServicer(lambda: coordinator), server)
    server.add_generic_rpc_handlers((Protocol1Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    work = asyncio.create_task(coordinator.run())
    return Host(
        folder,
        coordinator,
        artifacts,
        work,
        server,
        channel,
        rpc.FederationStub(channel),
        status_rpc.OperationsStub(channel),
    )


async def enroll(host: Host, name: str = "a", *, rows: int = 10, evaluates: bool = False, **fields: Any) -> str:
    request = pb.EnrollRequest(site=name, protocol_versions=[2], **fields)
    session = (await host.federation.Enroll(request)).session
    registration = pb.RegisterRequest(
        session=session,
        fingerprint=FINGERPRINT,
        manifest=MANIFEST.to_proto(),
        rows=rows,
        evaluates=evaluates,
        evaluation_rows=10 * evaluates,
    )
    await host.federation.Register(registration)
    return str(session)


async def task_of(host: Host, session: str) -> pb.NextTaskResponse:
    """The site's next task, or the run's end."""
    while True:
        answer: pb.NextTaskResponse = await host.federation.NextTask(pb.NextTaskRequest(session=session, wait_s=5))
        if answer.WhichOneof("next") != "wait":
            return answer


def written(host: Host, value: float, manifest: AdapterManifest = MANIFEST) -> tuple[Path, Artifact]:
    path = host.folder / f"update-{value}.safetensors"
    return path, write_adapter(path, manifest, lambda t: np.full(t.shape, value, np.float32), "float32")


async def send(
    host: Host, session: str, content: bytes, artifact: Artifact, *, offset: int = 0, chunk: int = 50
) -> None:
    async def parts() -> AsyncIterator[transfer_pb2.UploadRequest]:
        yield transfer_pb2.UploadRequest(
            header=transfer_pb2.UploadHeader(session=session, artifact=artifact.to_proto(), offset=offset)
        )
        for begin in range(offset, len(content), chunk):
            yield transfer_pb2.UploadRequest(chunk=content[begin : begin + chunk])

    await host.federation.Upload(parts())


async def complete(
    host: Host, session: str, task_id: str, artifact: Artifact, samples: int = 10, loss: float = 1.0
) -> pb.CompleteTaskResponse:
    return await complete_with(
        host, session, task_id, pb.TrainResult(update=artifact.to_proto(), samples=samples, loss=loss)
    )


async def complete_with(host: Host, session: str, task_id: str, result: Message) -> pb.CompleteTaskResponse:
    request = pb.CompleteTaskRequest(session=session, task_id=task_id)
    request.result.Pack(result)
    response: pb.CompleteTaskResponse = await host.federation.CompleteTask(request)
    return response


async def refused(call: Any) -> Exception:
    """The domain error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_of(caught.value)
    assert error is not None, caught.value
    return error


async def pause(host: Host, reason: str = "maintenance") -> None:
    await host.operations.Pause(status_pb2.PauseRequest(reason=reason))


async def resume(host: Host, reason: str = "") -> None:
    await host.operations.Resume(status_pb2.ResumeRequest(reason=reason))
