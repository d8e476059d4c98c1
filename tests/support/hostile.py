"""A site that means harm: it enrolls like any other, over raw gRPC, and delivers whatever a test tells it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_server.run.state import RunState
from fedhds_server.storage.sql import SqlStore

_CHUNK_SIZE = 1 << 20
_PATIENCE_S = 120.0


def state_of(run: Path) -> RunState:
    """The state of a run as its coordinator saved it last, also while it runs."""
    store = SqlStore.in_folder(run)
    deadline = time.monotonic() + _PATIENCE_S
    try:
        # A coordinator listens before it leads and writes its first state.
        while (state := store.load()) is None:
            assert time.monotonic() < deadline, "the run has no state"
            time.sleep(0.02)
    finally:
        store.close()
    return state


def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@dataclass(frozen=True)
class Forgery:
    """What the site delivers in every round: tensors of a manifest of its own making, and claims about them."""

    tensor: Callable[[TensorSpec], FloatArray]
    manifest: Callable[[AdapterManifest], AdapterManifest] = lambda honest: honest
    samples: int = 8
    loss: float = 1.0


class Hostile:
    """Works in a thread of the test's process until the run is over or it is shut out; `answers` says how it fared.

    It takes fingerprint and manifest from the run's state, so a real site must have registered before.
    """

    def __init__(self, run: Path, folder: Path, name: str, forgery: Forgery, *, rows: int = 8) -> None:
        self.answers: list[pb.CompleteTaskResponse] = []
        self._folder = folder
        self._name = name
        self._forgery = forgery
        self._channel = grpc.insecure_channel((run / "address").read_text().strip())
        self._stub = rpc.FederationStub(self._channel)
        until(lambda: bool(state_of(run).manifest))
        self._manifest = state_of(run).adapter_manifest
        self._fingerprint = pb.ModelFingerprint(**state_of(run).fingerprint)
        self._session = self._stub.Enroll(pb.EnrollRequest(site=name, protocol_versions=[2])).session
        self.register(rows)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name)
        self._thread.start()

    def register(self, rows: int) -> None:
        """Declares so many rows, truly or not."""
        self._stub.Register(
            pb.RegisterRequest(
                session=self._session, fingerprint=self._fingerprint, manifest=self._manifest.to_proto(), rows=rows
            )
        )

    def finish(self) -> None:
        """Waits for its end; raises what went wrong with it."""
        self._thread.join(_PATIENCE_S)
        assert not self._thread.is_alive()
        self._channel.close()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while not self._next():
                pass
        except BaseException as failure:  # noqa: BLE001 - raised in the test's own thread
            self._failure = failure

    def _next(self) -> bool:
        """Does one task; whether the run is over."""
        answer = self._stub.NextTask(pb.NextTaskRequest(session=self._session, wait_s=2))
        match answer.WhichOneof("next"):
            case "task" if answer.task.kind == "train":
                artifact = self._upload(answer.task.round_number)
                forgery = self._forgery
                done = pb.CompleteTaskRequest(session=self._session, task_id=answer.task.id)
                done.result.Pack(pb.TrainResult(update=artifact.to_proto(), samples=forgery.samples, loss=forgery.loss))
                self.answers.append(self._stub.CompleteTask(done))
            case "done":
                self._stub.ConfirmDelivery(pb.ConfirmDeliveryRequest(session=self._session))
                self._stub.Leave(pb.LeaveRequest(session=self._session))
                return True
        return False

    def _upload(self, round_number: int) -> Artifact:
        path = self._folder / f"{self._name}-{round_number}.safetensors"
        manifest = self._forgery.manifest(self._manifest)
        artifact = write_adapter(path, manifest, self._forgery.tensor, "float32")
        self._stub.Upload(self._parts(path, artifact))
        return artifact

    def _parts(self, path: Path, artifact: Artifact) -> Iterator[transfer_pb2.UploadRequest]:
        header = transfer_pb2.UploadHeader(session=self._session, artifact=artifact.to_proto())
        yield transfer_pb2.UploadRequest(header=header)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_SIZE):
                yield transfer_pb2.UploadRequest(chunk=chunk)
