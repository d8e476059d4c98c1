"""A federation with mutual TLS to attack: one coordinator, honest sites whose training can be held back, raw callers.

An honest run is going on while a test attacks: training waits for `open_gate`, heartbeats do not. `finish` lets it end.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedhds.security.credentials import TlsFiles, channel_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds.v2 import transfer_pb2
from fedhds_server.coordinator.uploads import owner_of
from fedhds_server.run.state import RunState
from fedhds_server.storage.sql import SqlStore
from tests.support.federation import Daemon, Federation
from tests.support.hostile import state_of, until
from tests.support.sabotage import WAITING, sabotaged
from tests.support.tiny import write_rows

# No attack of a test may take longer; the honest sites wait meanwhile.
CALL_S = 60.0
ROWS = 8


class SecureFederation(Federation):
    """Processes that speak mutual TLS; any name has a certificate as soon as it is asked for."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.tls = folder / "certs"
        init_authority(self.tls)
        self.certificate("coordinator", Role.COORDINATOR)
        self.attackers: list[Attacker] = []
        self.sites: list[Daemon] = []
        self.coordinator: Daemon

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def state(self) -> RunState:
        """The run as it is saved."""
        return state_of(self.run)

    @property
    def adapter(self) -> bytes:
        """The final adapter."""
        return (self.run / "checkpoint" / "adapter_model.safetensors").read_bytes()

    def certificate(self, name: str, role: Role = Role.SITE) -> TlsFiles:
        """The certificate and key of `name`, issued when it is asked for first."""
        assert self.tls is not None
        files = TlsFiles(self.tls / "ca.crt", self.tls / f"{name}.crt", self.tls / f"{name}.key")
        if not files.cert.exists():
            issue(self.tls, name, role=role, hosts=("127.0.0.1",) if role is Role.COORDINATOR else ())
        return files

    def begin(self, *flags: object) -> Daemon:
        """Starts the coordinator."""
        self.coordinator = self.server(*flags)
        return self.coordinator

    def honest(self, name: str, *flags: object, rows: int = ROWS) -> Daemon:
        """Starts a site that does as it should; its training waits for the gate."""
        self.certificate(name)
        data = write_rows(self.folder / f"{name}.jsonl", {name: rows})
        with sabotaged(self, WAITING.format(gate=str(self.folder / "gate"))):
            site = self.client(name, f"--data={data}", *flags)
        self.sites.append(site)
        return site

    def attacker(self, site: str, certificate: TlsFiles | None = None) -> Attacker:
        """A caller with a certificate: by default its own, of the name up to "/"."""
        attacker = Attacker(self, site, certificate or self.certificate(site.partition("/")[0]))
        self.attackers.append(attacker)
        return attacker

    def open_gate(self) -> None:
        """Lets the honest sites train."""
        (self.folder / "gate").touch()

    def finish(self) -> None:
        """Lets the run end; every honest site ends well, and the coordinator without a traceback."""
        self.open_gate()
        for attacker in self.attackers:
            attacker.close()
        assert self.coordinator.wait() == 0, self.coordinator.text
        assert [site.wait() for site in self.sites] == [0] * len(self.sites), "\n".join(s.text for s in self.sites)
        assert "Traceback" not in self.coordinator.text, self.coordinator.text

    @contextmanager
    def memory(self) -> Iterator[Callable[[], int]]:
        """Gives what tells by how many bytes the memory of the coordinator's process has grown at most since."""
        process = Path(f"/proc/{self.coordinator.process.pid}")

        def peak() -> int:
            (line,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:")]
            return int(line.split()[1]) << 10

        # The peak begins again at what is used now (proc_pid_clear_refs(5)).
        (process / "clear_refs").write_text("5")
        before = peak()
        yield lambda: peak() - before

    @property
    def journal(self) -> list[str]:
        """All lines of the journal."""
        store = SqlStore.in_folder(self.run)
        try:
            return [entry.message for entry in store.journal()]
        finally:
            store.close()

    def parts(self) -> dict[str, int]:
        """Sizes of what has come of uploads that have not ended, by the site's name if it is an attacker's."""
        names = {owner_of(attacker.site): attacker.site for attacker in self.attackers}
        found: dict[str, int] = Counter()
        for path in (self.run / "artifacts").glob("*.part"):
            owner = path.stem.partition("-")[2]
            found[names.get(owner, owner)] += path.stat().st_size
        return found

    @contextmanager
    def heartbeats(self, name: str = "pulse") -> Iterator[list[float]]:
        """Seconds that each heartbeat of an honest caller takes within the block, filled in as it goes on."""
        caller = self.attacker(name)
        caller.enroll()
        seconds: list[float] = []
        ended = threading.Event()

        def beat() -> None:
            while not ended.is_set():
                begin = time.monotonic()
                caller.stub.Heartbeat(pb.HeartbeatRequest(session=caller.session), timeout=CALL_S)
                seconds.append(time.monotonic() - begin)
                ended.wait(0.05)

        thread = threading.Thread(target=beat, name="heartbeats")
        thread.start()
        try:
            yield seconds
        finally:
            ended.set()
            thread.join()
            caller.leave()


class Attacker:
    """Calls the coordinator without any regard for what a site would do."""

    def __init__(self, federation: SecureFederation, site: str, certificate: TlsFiles) -> None:
        self.site = site
        self.session = ""
        self._federation = federation
        options = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
        self.channel = grpc.secure_channel(federation.address(), channel_credentials(certificate), options)
        self.stub: Any = rpc.FederationStub(self.channel)

    def close(self) -> None:
        """Breaks the connection."""
        self.channel.close()

    def enroll(self, **fields: Any) -> pb.EnrollResponse:
        """Takes its name; `fields` replace those of an honest request."""
        request = pb.EnrollRequest(**{"site": self.site, "protocol_versions": [2], **fields})
        answer: pb.EnrollResponse = self.stub.Enroll(request, timeout=CALL_S)
        self.session = answer.session
        return answer

    def registration(self, **fields: Any) -> pb.RegisterRequest:
        """An honest registration, but for `fields`; it copies a site that has registered before."""
        until(lambda: bool(self._federation.state.manifest))
        state = self._federation.state
        honest = {
            "session": self.session,
            "fingerprint": pb.ModelFingerprint(**state.fingerprint),
            "manifest": state.adapter_manifest.to_proto(),
            "rows": ROWS,
            "evaluation_rows": ROWS if fields.get("evaluates") else 0,
        }
        return pb.RegisterRequest(**{**honest, **fields})

    def register(self, **fields: Any) -> None:
        """Takes part; `fields` replace those of an honest request."""
        self.stub.Register(self.registration(**fields), timeout=CALL_S)

    def task(self) -> pb.Task:
        """Its next task, when there is one."""
        while True:
            answer = self.stub.NextTask(pb.NextTaskRequest(session=self.session, wait_s=5), timeout=CALL_S)
            if answer.HasField("task"):
                task: pb.Task = answer.task
                return task
            assert not answer.HasField("done"), "the run is over"

    def upload(self, content: bytes, artifact: Artifact, *, session: str = "", chunk_size: int = 1 << 20) -> None:
        """Sends `content` as the bytes of `artifact`."""
        parts = (content[at : at + chunk_size] for at in range(0, len(content), chunk_size))
        self.upload_parts(parts, artifact, session=session)

    def upload_parts(self, parts: Iterable[bytes], artifact: Artifact, *, session: str = "") -> None:
        """Sends `parts` as the bytes of `artifact`."""

        def messages() -> Iterator[transfer_pb2.UploadRequest]:
            header = transfer_pb2.UploadHeader(session=session or self.session, artifact=artifact.to_proto())
            yield transfer_pb2.UploadRequest(header=header)
            for part in parts:
                yield transfer_pb2.UploadRequest(chunk=part)

        self.stub.Upload(messages(), timeout=CALL_S)

    def complete(self, task_id: str, result: Any) -> pb.CompleteTaskResponse:
        """Delivers a result."""
        request = pb.CompleteTaskRequest(session=self.session, task_id=task_id)
        request.result.Pack(result)
        answer: pb.CompleteTaskResponse = self.stub.CompleteTask(request, timeout=CALL_S)
        return answer

    def leave(self) -> None:
        """Says goodbye, so that the run does not wait for it."""
        self.stub.Leave(pb.LeaveRequest(session=self.session), timeout=CALL_S)

    def raw(self, method: str, content: bytes) -> bytes:
        """Sends bytes as the message of a unary call of Federation; gives those of the answer."""
        answer: bytes = self.channel.unary_unary(f"/fedhds.v2.Federation/{method}")(content, timeout=CALL_S)
        return answer
