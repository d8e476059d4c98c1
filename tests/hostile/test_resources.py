"""What one certificate can use of the coordinator: memory, time, disk, sessions, lines, connections.

The attacks share one run. Its sites a and b wait in training meanwhile, then train while the attacks go on, and their
adapter is what they give alone: the attackers z, y and x, which have tasks, leave without a result that counts.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import grpc
import pytest

from fedhds.security.identity import Role
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import MAX_TENSORS
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2, transfer_pb2
from fedhds_server.coordinator.uploads import owner_of
from fedhds_server.rpc.limits import MAX_MESSAGE
from tests.hostile.conftest import Secured, Undisturbed
from tests.support.attackers import CALL_S, Attacker, SecureFederation
from tests.support.federation import free_port
from tests.support.hostile import until

pytestmark = pytest.mark.e2e

ROUNDS = "--rounds=2"
LARGE = 32 << 20
TENSORS = 100_000


@dataclass
class Scene:
    """A run in its first round, and what attackers did before it had a manifest."""

    federation: SecureFederation
    flags: list[str]
    attackers: dict[str, Attacker]
    tasks: dict[str, pb.Task]
    early: list[grpc.StatusCode]
    pulse: list[float]
    growth: int
    silent: list[socket.socket]

    def __getitem__(self, name: str) -> Attacker:
        return self.attackers[name]


@pytest.fixture(scope="module")
def scene(secured: Secured, undisturbed: Undisturbed) -> Iterator[Scene]:
    address, page = (f"127.0.0.1:{free_port()}" for _ in range(2))
    flags = [ROUNDS, "--min-sites=5", "--quorum=2", f"--listen={address}", f"--http={page}"]
    federation = secured(*flags, names="")
    # Before anybody has registered, nobody knows how large a manifest may be.
    with federation.memory() as growth:
        early, pulse = first_manifests(federation)
        grown = growth()
    silent = [socket.create_connection(("127.0.0.1", port(address))) for _ in range(50)]
    silent += [socket.create_connection(("127.0.0.1", port(page))) for _ in range(50)]
    for connection in silent[50:]:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: local")
    for name in "ab":
        federation.honest(name)
    until(lambda: bool(federation.state.manifest))
    attackers = {name: federation.attacker(name) for name in "xyz"}
    for attacker in attackers.values():
        attacker.enroll()
        attacker.register()
    tasks = {name: attacker.task() for name, attacker in attackers.items()}
    made = Scene(federation, flags, attackers, tasks, early, pulse, grown, silent)
    yield made
    with burst(federation):
        for attacker in attackers.values():
            attacker.leave()
        # All that was theirs goes with them.
        until(lambda: not federation.parts())
        federation.open_gate()
        until(lambda: federation.state.phase.over)
    federation.finish()
    for connection in silent:
        connection.close()
    assert federation.adapter == undisturbed(ROUNDS)


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def status(call: Callable[[], object]) -> grpc.StatusCode:
    """How a call ends."""
    try:
        call()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def details(call: Callable[[], object]) -> str:
    """What a call that is refused is told."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return str(caught.value.details())


def together(*calls: Callable[[], object]) -> list[grpc.StatusCode]:
    """How calls end that are made at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(status, calls))


def prompt(seconds: list[float]) -> bool:
    """Whether heartbeats were answered within a second; a machine that stood still itself may hold up one in ten."""
    assert len(seconds) > 4, seconds
    tenths = statistics.quantiles(seconds, n=10)
    assert tenths[-1] < 1, sorted(seconds)[-20:]
    return max(seconds) < 10


def first_manifests(federation: SecureFederation) -> tuple[list[grpc.StatusCode], list[float]]:
    attackers = [federation.attacker(name) for name in ("first", "second")]
    for attacker in attackers:
        attacker.enroll()
    manifests = []
    # More bytes than any manifest has, and as many tensors as one may have.
    for tensors in (TENSORS, MAX_TENSORS):
        manifest = pb.AdapterManifest(config="{}")
        for number in range(tensors):
            name = f"base_model.model.layers.{number:06d}.self_attn.q_proj.lora_A.weight"
            manifest.tensors.add(name=name, shape=[2, 4], role="lora_A", initial=pb.INITIAL_KIND_ZEROS)
        manifests.append(manifest)
    fingerprint = pb.ModelFingerprint(**dict.fromkeys(("weights", "config", "tokenizer", "template"), "0" * 64))
    requests = [
        pb.RegisterRequest(session=attacker.session, fingerprint=fingerprint, manifest=manifest, rows=8)
        for attacker, manifest in zip(attackers, manifests, strict=True)
    ]
    with federation.heartbeats() as seconds:
        codes = together(
            *(
                partial(attacker.stub.Register, request, timeout=CALL_S)
                for attacker, request in zip(attackers, requests, strict=True)
                for _ in range(3)
            )
        )
    for attacker in attackers:
        attacker.leave()
    return codes, seconds


@contextmanager
def burst(federation: SecureFederation) -> Iterator[None]:
    """Attacks again and again while the run ends."""
    ended = threading.Event()

    def attack() -> None:
        attacker = Attacker(federation, "burst", federation.certificate("burst"))
        large = bytes(LARGE)
        with suppress(grpc.RpcError, ValueError):
            while not ended.is_set():
                for method in ("CompleteTask", "Register"):
                    status(partial(attacker.raw, method, large))
                attacker.enroll()
                status(lambda: attacker.upload(b"x" * 1000, Artifact("0" * 64, 1000)))
                attacker.leave()
                ended.wait(0.2)
        attacker.close()

    federation.certificate("burst")
    thread = threading.Thread(target=attack, name="burst")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# Memory and CPU.


def test_a_first_manifest_of_any_size_is_refused_and_heartbeats_go_on(scene: Scene) -> None:
    # What is longer than any message is not read at all.
    assert scene.early == [*3 * [grpc.StatusCode.RESOURCE_EXHAUSTED], *3 * [grpc.StatusCode.INVALID_ARGUMENT]]
    assert scene.growth < 8 * LARGE
    assert prompt(scene.pulse)


def test_large_messages_cost_little_memory_and_are_not_read_without_a_session(scene: Scene) -> None:
    federation = scene.federation
    nobodies = [federation.attacker("m") for _ in range(8)]
    methods = ("CompleteTask", "Register", "Heartbeat", "NextTask", "Enroll", "Leave", "GetUpload", "FailTask")
    codes = []
    with federation.memory() as growth, federation.heartbeats() as seconds:
        for content in (bytes(LARGE), bytes(MAX_MESSAGE)):
            calls = [partial(caller.raw, method, content) for caller, method in zip(nobodies, methods, strict=True)]
            codes.append(together(*calls, *calls))
        in_stream = details(lambda: nobodies[0].upload_parts([content], Artifact("0" * 64, 1000), session="x" * 64))
    unauthenticated, invalid = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT
    assert codes == [16 * [grpc.StatusCode.RESOURCE_EXHAUSTED], 2 * [*2 * [unauthenticated], *6 * [invalid]]]
    assert "session is unknown" in in_stream
    assert growth() < 4 * LARGE
    assert prompt(seconds)


def test_a_session_does_not_make_manifests_and_reports_larger_than_the_run_needs(scene: Scene) -> None:
    z, task = scene["z"], scene.tasks["z"]
    manifest = z.registration().manifest
    for number in range(MAX_TENSORS):
        manifest.tensors.add(name=f"z.{number:06d}", shape=[2, 4], role="lora_A", initial=pb.INITIAL_KIND_ZEROS)
    report = selection_pb2.ClusterReport(dimension=256)
    for number in range(3000):
        report.centroids.add(cluster_id=number, values=[0.5] * 256, size=1)
    with scene.federation.heartbeats() as seconds:
        for _ in range(10):
            assert "is too long: Register takes up to" in details(lambda: z.register(manifest=manifest))
            assert "is too long: CompleteTask takes up to" in details(lambda: z.complete(task.id, report))
    assert prompt(seconds)
    assert task.id in scene.federation.state.tasks


def test_a_header_is_read_no_further_than_the_runs_tensors_need(scene: Scene) -> None:
    x, task, federation = scene["x"], scene.tasks["x"], scene.federation
    size = os.stat(federation.run / "artifacts" / task.adapter.digest).st_size
    assert "bytes is none of this task's" in details(lambda: x.upload(bytes(1 << 20), Artifact("0" * 64, 60 << 20)))
    content = struct.pack("<Q", 60 << 20) + b"[" * (size - 8)
    artifact = artifact_of(content)
    x.upload(content, artifact)
    answer = x.complete(task.id, pb.TrainResult(update=artifact.to_proto(), samples=8, loss=1.0))
    assert answer.rejected
    assert "header is longer than" in answer.reason
    until(lambda: not (federation.run / "artifacts" / artifact.digest).exists())


def artifact_of(content: bytes) -> Artifact:
    return Artifact(hashlib.sha256(content).hexdigest(), len(content))


# Disk.


def test_an_upload_without_a_task_is_refused(scene: Scene) -> None:
    federation = scene.federation
    idle = federation.attacker("idle")
    idle.enroll()
    idle.register()
    artifact = Artifact(scene.tasks["z"].adapter.digest, scene.tasks["z"].adapter.size)
    for _ in range(20):
        assert "no open task of this site takes an upload" in details(lambda: idle.upload(b"x" * 1000, artifact))
    request = transfer_pb2.GetUploadRequest(session=idle.session, artifact=artifact.to_proto())
    assert status(lambda: idle.stub.GetUpload(request, timeout=CALL_S)) is grpc.StatusCode.NOT_FOUND
    assert "idle" not in federation.parts()
    idle.leave()


def test_a_site_has_one_upload_at_a_time_of_its_tasks_size(scene: Scene) -> None:
    federation, z, size = scene.federation, scene["z"], scene.tasks["z"].adapter.size
    names = [Artifact(f"{number:064x}", size) for number in range(20)]
    for artifact in names[:10]:
        assert "ended after 1000" in details(partial(z.upload, b"x" * 1000, artifact))
    together(*(partial(z.upload, b"x" * 1000, artifact) for artifact in names))
    until(lambda: federation.parts().get("z", 0) <= size)
    assert len(list((federation.run / "artifacts").glob(f"*-{owner_of('z')}.part"))) <= 1
    for odd in (1, size // 2, 10 * size, 1 << 40):
        assert "none of this task's" in details(partial(z.upload, b"x", Artifact("0" * 64, odd)))


def test_a_site_does_not_touch_the_bytes_of_another(scene: Scene) -> None:
    y, z, size = scene["y"], scene["z"], scene.tasks["z"].adapter.size
    content = os.urandom(size)
    artifact = artifact_of(content)
    assert "ended after 1000" in details(lambda: y.upload(content[:1000], artifact))
    assert "another digest" in details(lambda: z.upload(bytes(size), artifact))
    request = transfer_pb2.GetUploadRequest(session=y.session, artifact=artifact.to_proto())
    assert y.stub.GetUpload(request, timeout=CALL_S).offset == 1000


def test_a_coordinator_that_restarts_goes_on_with_uploads_of_open_tasks_alone(scene: Scene) -> None:
    y, federation = scene["y"], scene.federation
    artifacts = federation.run / "artifacts"
    content = os.urandom(scene.tasks["y"].adapter.size)
    artifact = artifact_of(content)
    assert "ended after 1000" in details(lambda: y.upload(content[:1000], artifact))
    forgotten = artifacts / f"{'0' * 64}-{owner_of('nobody')}.part"
    forgotten.write_bytes(b"x" * 1000)
    federation.coordinator.kill()
    federation.begin("--selection-strategy=full", "--evaluate-every=0", *scene.flags)
    until(lambda: not forgotten.exists())
    request = transfer_pb2.GetUploadRequest(session=y.session, artifact=artifact.to_proto())
    answer = y.stub.GetUpload(request, timeout=CALL_S, wait_for_ready=True)
    assert answer.offset == 1000
    y.upload(content, artifact)
    assert (artifacts / artifact.digest).read_bytes() == content


# Sessions.


def test_a_session_is_of_use_to_its_own_key_only(scene: Scene) -> None:
    federation, z, task = scene.federation, scene["z"], scene.tasks["z"]
    federation.certificate("boss", Role.OPERATOR)
    for thief in (federation.attacker("thief"), federation.attacker("boss")):
        thief.session = z.session
        assert "session is unknown" in details(thief.leave)
        assert "session is unknown" in details(partial(thief.complete, task.id, pb.TrainResult()))
        assert "session is unknown" in details(partial(thief.upload, b"x", Artifact("0" * 64, 1)))
        assert "session is unknown" in details(thief.register)
        for request in (pb.HeartbeatRequest, pb.NextTaskRequest):
            method = getattr(thief.stub, request.__name__.removesuffix("Request"))
            code = status(partial(method, request(session=z.session), timeout=CALL_S))
            assert code is grpc.StatusCode.UNAUTHENTICATED
    assert z.task().id == task.id


def test_of_results_that_come_together_one_counts_and_the_others_are_told(scene: Scene) -> None:
    z, task = scene["z"], scene.tasks["z"]
    # Nothing to train on: a result that adds nothing to the adapter.
    results = [pb.TrainResult(train_s=1.0 + number) for number in range(8)]
    with ThreadPoolExecutor(len(results)) as pool:
        answers = list(pool.map(lambda result: z.complete(task.id, result), results))
    assert sorted(answer.accepted for answer in answers) == [*7 * [False], True]
    told = {answer.reason for answer in answers if not answer.accepted}
    assert told == {"another result of this task was accepted; this one does not count"}
    # Who did not hear the answer asks again.
    accepted = next(result for result, answer in zip(results, answers, strict=True) if answer.accepted)
    assert z.complete(task.id, accepted).accepted


# Flooding.


def test_one_long_poll_waits_for_a_site(scene: Scene) -> None:
    waiting = scene.federation.attacker("waiting")
    waiting.enroll()
    request = pb.NextTaskRequest(session=waiting.session, wait_s=30)
    polls = [waiting.stub.NextTask.future(request, timeout=CALL_S) for _ in range(200)]
    until(lambda: sum(poll.done() for poll in polls) >= 199)
    waiting.leave()
    for poll in polls:
        poll.cancel()


def test_enrollments_are_bounded_and_leave_few_lines(scene: Scene) -> None:
    federation = scene.federation
    crowd = federation.attacker("crowd")
    with federation.heartbeats() as seconds:
        crowd.enroll()
        crowd.leave()
        assert "this site has left the run; enroll again" in details(crowd.register)
        while status(crowd.enroll) is grpc.StatusCode.OK:
            status(crowd.register)
            crowd.leave()
        refused = details(crowd.enroll)
        assert refused == "the site 'crowd' enrolls and registers too often; try again later"
        calls = [
            crowd.stub.Enroll.future(pb.EnrollRequest(site=f"name-{number}", protocol_versions=[2]), timeout=CALL_S)
            for number in range(2000)
        ]
        codes = [status(call.result) for call in calls]
    # gRPC says now and then that it was cancelled, of a call that was refused before its request had come.
    assert set(codes) - {grpc.StatusCode.CANCELLED} == {
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    lines = federation.journal
    assert 100 < sum("crowd" in line for line in lines) < 400
    assert not any("name-" in line for line in lines)
    assert prompt(seconds)


def test_connections_on_which_nothing_is_said_are_closed(scene: Scene) -> None:
    deadline = time.monotonic() + CALL_S
    for connection in scene.silent:
        connection.settimeout(max(deadline - time.monotonic(), 0.1))
        with suppress(ConnectionResetError):
            while connection.recv(1 << 12):
                pass


def test_metrics_are_not_told_to_a_page_that_names_another_host(scene: Scene) -> None:
    page = urlsplit(f"//{scene.flags[-1].partition('=')[2]}")
    for name, expected in (("evil.example.org", 421), (f"localhost:{page.port}", 200)):
        connection = http.client.HTTPConnection(str(page.hostname), page.port, timeout=CALL_S)
        connection.request("GET", "/metrics", headers={"Host": name})
        assert connection.getresponse().status == expected
        connection.close()
