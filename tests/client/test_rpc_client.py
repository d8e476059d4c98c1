"""The client against a real server behind a relay that can be cut: calls are repeated, transfers go on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest

from fedhds.errors import (
    ArtifactError,
    CoordinatorUnreachable,
    DamagedArtifact,
    EnrollmentRefused,
    FedhdsError,
    NotLeading,
    PrivacyError,
    SessionLost,
    StorageError,
    TaskError,
)
from fedhds.grpc_errors import abort
from fedhds.security.credentials import server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.transfer import chunks
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.rpc_client import CoordinatorClient
from fedhds_server.coordinator.admission import Admission
from fedhds_server.coordinator.uploads import Upload, owner_of
from fedhds_server.rpc.federation import FederationServicer
from fedhds_server.run.state import RunState, Site
from fedhds_server.storage.artifacts import ArtifactStore
from tests.support.tls_servers import serving

CHUNK_SIZE = chunks.MAX_CHUNK
SESSION = "session"
BEAT = pb.HeartbeatRequest(session=SESSION, task_id="train/1/ward")

Fault = Callable[[Any], Awaitable[None]]


class Relay:
    """A TCP relay before the server: what breaks a connection without either end being at fault."""

    def __init__(self) -> None:
        self.server_port = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Breaks all connections; new ones are let through."""
        for writer in self._writers:
            writer.transport.abort()

    def down(self) -> None:
        """Breaks all connections; new ones are refused until it is up again."""
        if self._server:
            self._server.close()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside, outside = await asyncio.open_connection("127.0.0.1", self.server_port)
        ends = {writer, outside}
        self._writers |= ends
        await asyncio.gather(self._pump(reader, outside), self._pump(inside, writer))
        self._writers -= ends

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()


class Store(ArtifactStore):
    """The coordinator's own store; notes where transfers begin and does `on_chunk` at every chunk that passes."""

    on_chunk: Callable[[], None] | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, largest_upload=1 << 30)
        self.uploads: list[int] = []
        self.downloads: list[int] = []

    def append(self, artifact: Artifact, offset: int, chunk: bytes | memoryview, owner: str = "") -> None:
        super().append(artifact, offset, chunk, owner)
        self.uploads.append(offset)
        if self.on_chunk:
            self.on_chunk()

    def open_chunks(self, artifact: Artifact, offset: int, chunk_size: int) -> Iterator[bytes]:
        self.downloads.append(offset)
        for chunk in super().open_chunks(artifact, offset, chunk_size):
            yield chunk
            if self.on_chunk:
                self.on_chunk()


class Faults(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Notes every call, and answers the next ones as planned."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.planned: list[Fault] = []
        self.always: Fault | None = None

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.calls.append(details.method.rpartition("/")[2])
        handler = await continuation(details)
        fault = self.planned.pop(0) if self.planned else self.always
        if fault is None:
            return handler

        async def fail(request: Any, context: Any) -> None:
            await fault(context)

        return grpc.unary_unary_rpc_method_handler(fail, handler.request_deserializer, handler.response_serializer)


@dataclass
class World:
    """A coordinator's server in this process, and the way to it."""

    folder: Path
    store: Store
    adapters: dict[int, Artifact]
    tasks: dict[str, Any]
    relay: Relay = field(default_factory=Relay)
    faults: Faults = field(default_factory=Faults)
    clients: list[CoordinatorClient] = field(default_factory=list)

    def client(self, *, reconnect_timeout_s: float = 20.0) -> CoordinatorClient:
        client = CoordinatorClient(f"127.0.0.1:{self.relay.port}", None, reconnect_timeout_s=reconnect_timeout_s)
        self.clients.append(client)
        return client

    def breaks_after(self, chunks: int, ready: Callable[[], bool] = lambda: True, *, slow_s: float = 0.0) -> None:
        """Cuts the connection once: after so many chunks of `slow_s` each, when `ready`; what is under way is lost."""
        loop, passed = asyncio.get_running_loop(), 0

        def on_chunk() -> None:
            nonlocal passed
            passed += 1
            time.sleep(slow_s)
            if passed != chunks:
                return
            while not ready():
                time.sleep(0.01)
            is_cut = threading.Event()

            def cut() -> None:
                self.relay.cut()
                is_cut.set()

            loop.call_soon_threadsafe(cut)
            is_cut.wait()
            raise StorageError("the connection is cut")

        self.store.on_chunk = on_chunk


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async def site_of(session: str, key: str = "") -> Any:
        if session != SESSION:
            raise SessionLost("the session is not known")
        return SimpleNamespace(name="ward", key="", serial="")

    async def next_task(site: Any, wait_s: float) -> None:
        await asyncio.sleep(wait_s)

    async def begin(site: str, artifact: Artifact, offset: int) -> Upload:
        return Upload(site, artifact)

    def noted(*_: object) -> None:
        return None

    sites = {"ward": Site(name="ward")}
    state = RunState(run_id="r", spec=RunSpec.of(model="m", rounds=5), round_number=3, message="wait", sites=sites)
    made = World(tmp_path, Store(tmp_path / "artifacts"), state.adapters, state.tasks)
    turn, timers = asyncio.Lock(), SimpleNamespace(progress=SimpleNamespace(heard=noted))
    presence = SimpleNamespace(site_of=site_of, next_task=next_task, received=noted, turn=lambda site: turn)
    uploads = SimpleNamespace(begin=begin, check=noted, needs=lambda *_: True)
    parts = {"presence": presence, "uploads": uploads, "admission": Admission(), "timers": timers}
    coordinator = cast(Any, SimpleNamespace(state=state, artifacts=made.store, **parts))
    server = grpc.aio.server(interceptors=(made.faults,))
    FederationServicer(lambda: coordinator).register(server)
    made.relay.server_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await made.relay.up()
    yield made
    for client in made.clients:
        await client.close()
    made.relay.down()
    await server.stop(None)


def _file(path: Path, size: int) -> Artifact:
    path.write_bytes(np.random.default_rng(size).bytes(size))
    return Artifact.of_file(path)


def _refuses(code: grpc.StatusCode) -> Fault:
    async def fault(context: Any) -> None:
        await context.abort(code, "as planned")

    return fault


def _raises(error: Exception) -> Fault:
    async def fault(context: Any) -> None:
        await abort(context, error)

    return fault


async def _beat(client: CoordinatorClient) -> bool:
    return bool((await client.call(client.federation.Heartbeat, BEAT)).withdrawn)


@asynccontextmanager
async def _after(delay_s: float, action: Callable[[], Any]) -> AsyncIterator[None]:
    """Does something while the body is under way."""

    async def act() -> None:
        await asyncio.sleep(delay_s)
        result = action()
        if asyncio.iscoroutine(result):
            await result

    task = asyncio.create_task(act())
    yield
    await task


# Calls.


async def test_a_call_is_answered_and_its_bytes_are_counted(world: World) -> None:
    client = world.client()
    assert await _beat(client)
    assert world.faults.calls == ["Heartbeat"]
    assert client.bytes_sent == BEAT.ByteSize() > 0


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "RESOURCE_EXHAUSTED"])
async def test_a_call_that_fails_in_passing_is_repeated(world: World, code: str) -> None:
    world.faults.planned = [_refuses(grpc.StatusCode[code])] * 2
    client = world.client()
    assert await _beat(client)
    assert len(world.faults.calls) == 3
    assert client.bytes_sent == 3 * BEAT.ByteSize()


async def test_a_coordinator_that_cannot_store_is_asked_again(world: World) -> None:
    world.faults.planned = [_raises(StorageError("the disk is full"))]
    assert await _beat(world.client())
    assert len(world.faults.calls) == 2


async def test_a_call_that_was_under_way_when_the_connection_broke_is_repeated(world: World) -> None:
    async def cut(context: Any) -> None:
        world.relay.cut()
        await asyncio.sleep(60)

    world.faults.planned = [cut, cut]
    assert await _beat(world.client())
    assert len(world.faults.calls) == 3


async def test_a_coordinator_that_is_away_for_a_while_is_waited_for(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedhds_client.rpc_client")
    client = world.client()
    assert await _beat(client)
    world.relay.down()
    async with _after(1.0, world.relay.up):
        assert await _beat(client)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith(f"cannot reach 127.0.0.1:{world.relay.port}: nothing listens on")
    assert "trying again for " in messages[0]
    assert messages[1] == "the coordinator answers again"


async def test_sites_of_one_process_share_a_client(world: World) -> None:
    client = world.client()
    world.faults.planned = [_refuses(grpc.StatusCode.UNAVAILABLE)] * 3
    assert all(await asyncio.gather(*(_beat(client) for _ in range(20))))
    assert len(world.faults.calls) == 23


@pytest.mark.parametrize(
    "error",
    [
        SessionLost("enroll again"),
        TaskError("no such task"),
        ArtifactError("wrong digest"),
        EnrollmentRefused("another model"),
        PrivacyError("too much"),
    ],
)
async def test_what_the_coordinator_refuses_is_raised_as_what_it_is_and_not_repeated(
    world: World, error: FedhdsError
) -> None:
    world.faults.planned = [_raises(error)]
    with pytest.raises(type(error), match=f"^{error}$"):
        await _beat(world.client())
    assert len(world.faults.calls) == 1


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "PERMISSION_DENIED"])
async def test_any_other_failure_is_an_error_that_names_coordinator_and_status(world: World, code: str) -> None:
    world.faults.planned = [_refuses(grpc.StatusCode[code])]
    with pytest.raises(FedhdsError, match=rf"the coordinator at 127\.0\.0\.1:\d+ answered {code}: as planned"):
        await _beat(world.client())
    assert len(world.faults.calls) == 1


async def test_a_coordinator_that_does_not_know_the_call_is_an_older_one(world: World) -> None:
    world.faults.planned = [_refuses(grpc.StatusCode.UNIMPLEMENTED)]
    with pytest.raises(EnrollmentRefused, match=r"at 127\.0\.0\.1:\d+ does not know protocol 2 .*install"):
        await _beat(world.client())
    assert len(world.faults.calls) == 1


# Several coordinators, of which one leads.


async def test_what_a_standby_does_not_answer_goes_to_the_leader_at_once_and_stays_there(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fedhds_client.rpc_client")
    async with _standby() as (standby, calls):
        leader = f"127.0.0.1:{world.relay.port}"
        client = CoordinatorClient(f"{standby}, {leader}", None, reconnect_timeout_s=20)
        world.clients.append(client)
        began = time.monotonic()
        assert await _beat(client)
        assert time.monotonic() - began < 0.2, "it paused"
        assert all([await _beat(client) for _ in range(3)])
        assert len(calls) == 1
        path, artifact = world.folder / "update", _file(world.folder / "update", 3 * CHUNK_SIZE)
        await client.upload(SESSION, path, artifact)
    assert world.store.has(artifact)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{standby}: this one stands by; trying {leader}"]


async def test_sites_of_one_process_move_on_together(world: World) -> None:
    async with _standby() as (standby, calls):
        client = CoordinatorClient(f"{standby},127.0.0.1:{world.relay.port}", None, reconnect_timeout_s=20)
        world.clients.append(client)
        assert all(await asyncio.gather(*(_beat(client) for _ in range(20))))
        assert len(calls) <= 20
        assert len(world.faults.calls) == 20


async def test_of_several_addresses_that_lead_nowhere_each_is_explained(world: World) -> None:
    port = world.relay.port
    world.relay.down()
    async with _standby() as (standby, calls):
        client = CoordinatorClient(f"{standby},127.0.0.1:{port}", None, reconnect_timeout_s=0.7)
        world.clients.append(client)
        with pytest.raises(CoordinatorUnreachable) as caught:
            await _beat(client)
        assert f"at {standby}, 127.0.0.1:{port} for 0.7 s: " in str(caught.value)
        assert f"{standby}: this one stands by" in str(caught.value)
        assert f"127.0.0.1:{port}: nothing listens" in str(caught.value)
        # With pauses between the rounds, not in a tight loop.
        assert 2 <= len(calls) < 8


@asynccontextmanager
async def _standby() -> AsyncIterator[tuple[str, list[str]]]:
    """A coordinator that does not lead: its address, and the calls that it got."""
    calls: list[str] = []

    def leading() -> Any:
        calls.append("")
        raise NotLeading("this one stands by")

    server = grpc.aio.server()
    FederationServicer(leading).register(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}", calls
    await server.stop(None)


# The reconnect time-out.


async def _gives_up(client: CoordinatorClient, timeout_s: float) -> str:
    started = time.monotonic()
    with pytest.raises(CoordinatorUnreachable) as caught:
        await _beat(client)
    assert timeout_s <= time.monotonic() - started < timeout_s + 5
    return str(caught.value)


async def test_the_reconnect_timeout_ends_with_the_reason_and_what_to_check(world: World) -> None:
    world.relay.down()
    message = await _gives_up(world.client(reconnect_timeout_s=0.7), 0.7)
    target = f"127.0.0.1:{world.relay.port}"
    assert message.startswith(f"no answer from the coordinator at {target} for 0.7 s: nothing listens on {target}; ")
    assert message.endswith("check --server and that fedhds-server runs there")


async def test_the_reconnect_timeout_ends_also_with_a_coordinator_that_answers_but_never_well(world: World) -> None:
    world.faults.always = _raises(StorageError("the disk is full"))
    assert "the disk is full" in await _gives_up(world.client(reconnect_timeout_s=0.7), 0.7)
    world.faults.always = _refuses(grpc.StatusCode.UNAVAILABLE)
    before = len(world.faults.calls)
    assert "as planned" in await _gives_up(world.client(reconnect_timeout_s=1.5), 1.5)
    # After 0, 0.2, 0.6, 1.4 and 1.5 s: the pauses grow.
    assert 3 <= len(world.faults.calls) - before <= 6


async def test_the_reconnect_timeout_begins_again_with_every_call(world: World) -> None:
    client = world.client(reconnect_timeout_s=1.0)
    for _ in range(3):
        world.faults.planned = [_refuses(grpc.StatusCode.UNAVAILABLE)] * 2
        assert await _beat(client)


async def test_the_time_for_which_a_poll_is_held_does_not_count_as_silence(world: World) -> None:
    client = world.client(reconnect_timeout_s=0.6)
    request = pb.NextTaskRequest(session=SESSION, wait_s=1.5)
    async with _after(1.2, world.relay.cut):
        answer = await client.call(client.federation.NextTask, request, wait_s=1.5)
    assert answer.wait.reason == "waiting for 2 more sites"
    assert world.faults.calls == ["NextTask"] * 2


async def test_a_client_without_tls_to_a_coordinator_with_it_says_so(tmp_path: Path) -> None:
    folder = init_authority(tmp_path / "certs").parent
    async with serving(server_credentials(issue(folder, "coordinator", role=Role.COORDINATOR))) as listener:
        client = CoordinatorClient(listener.target, None, reconnect_timeout_s=0.3)
        assert "speaks TLS, but no --tls-* flags were given" in await _gives_up(client, 0.3)
        await client.close()
        client = CoordinatorClient(listener.target, issue(folder, "ward", role=Role.SITE), reconnect_timeout_s=20)
        # It gets through: this server has none of a coordinator's methods.
        with pytest.raises(EnrollmentRefused, match=f"{listener.target} does not know protocol 2"):
            await _beat(client)
        await client.close()


# Uploads.


async def test_an_upload_arrives_whole_and_is_counted(world: World) -> None:
    for size in (1, CHUNK_SIZE, 2 * CHUNK_SIZE + 5):
        client, path = world.client(), world.folder / "update"
        artifact = _file(path, size)
        await client.upload(SESSION, path, artifact)
        assert world.store.path(artifact).read_bytes() == path.read_bytes()
        assert client.bytes_sent == size


async def test_an_upload_goes_on_where_the_connection_broke(world: World) -> None:
    path, size = world.folder / "update", 5 * CHUNK_SIZE + 7
    artifact = _file(path, size)
    world.breaks_after(2)
    client = world.client()
    await client.upload(SESSION, path, artifact)
    assert world.store.path(artifact).read_bytes() == path.read_bytes()
    # In smaller chunks then.
    assert world.store.uploads == [0, CHUNK_SIZE, *range(2 * CHUNK_SIZE, size, CHUNK_SIZE // 2)]
    assert world.faults.calls.count("Upload") == 2
    assert size <= client.bytes_sent < 2 * size


async def test_chunks_are_smaller_while_many_sites_transfer(world: World) -> None:
    world.tasks |= {f"train/3/{number}": None for number in range(64)}
    client, path = world.client(), world.folder / "update"
    artifact = _file(path, CHUNK_SIZE)
    await client.upload(SESSION, path, artifact)
    assert world.store.uploads == [number * CHUNK_SIZE // 8 for number in range(8)]


async def test_a_coordinator_that_does_not_say_how_large_chunks_are_to_be_gets_them_of_512_kib(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "chunk_size", lambda _: 0)
    path = world.folder / "update"
    artifact = _file(path, 3 << 18)
    await world.client().upload(SESSION, path, artifact)
    assert world.store.uploads == [0, 1 << 19]


async def test_an_upload_of_a_restarted_site_goes_on_too(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, 3 * CHUNK_SIZE)
    world.store.append(artifact, 0, path.read_bytes()[: CHUNK_SIZE + 1], owner_of("ward"))
    await world.client().upload(SESSION, path, artifact)
    assert world.store.uploads[1:] == [CHUNK_SIZE + 1, 2 * CHUNK_SIZE + 1]
    assert world.store.has(artifact)


async def test_an_upload_whose_last_byte_arrived_just_before_the_connection_broke_is_made_durable(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, CHUNK_SIZE + 3)
    world.store.append(artifact, 0, path.read_bytes(), owner_of("ward"))
    assert not world.store.has(artifact)
    await world.client().upload(SESSION, path, artifact)
    assert world.store.has(artifact)


async def test_an_upload_that_is_there_already_sends_no_bytes(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, CHUNK_SIZE)
    await world.client().upload(SESSION, path, artifact)
    client = world.client()
    await client.upload(SESSION, path, artifact)
    assert client.bytes_sent == 0
    assert world.store.uploads == [0]


async def test_an_upload_onto_damaged_bytes_is_made_again(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, 3 * CHUNK_SIZE)
    world.store.append(artifact, 0, bytes(CHUNK_SIZE), owner_of("ward"))
    await world.client().upload(SESSION, path, artifact)
    assert world.store.path(artifact).read_bytes() == path.read_bytes()


async def test_an_upload_of_a_file_that_has_changed_is_an_error(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, 1000)
    for content in (bytes(1000), bytes(1001), bytes(999)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError):
            await world.client().upload(SESSION, path, artifact)
        assert not world.store.has(artifact)


async def test_an_upload_in_a_lost_session_is_an_error_at_once(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, 1000)
    with pytest.raises(SessionLost):
        await world.client().upload("another", path, artifact)
    assert world.faults.calls == ["GetUpload"]


async def test_an_upload_that_makes_no_progress_ends_with_the_reconnect_timeout(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(*_: object) -> None:
        raise StorageError("the disk is full")

    path = world.folder / "update"
    artifact = _file(path, 3 * CHUNK_SIZE)
    monkeypatch.setattr(world.store, "append", append)
    with pytest.raises(CoordinatorUnreachable, match=r"for 0\.7 s: the disk is full"):
        await asyncio.wait_for(world.client(reconnect_timeout_s=0.7).upload(SESSION, path, artifact), 20)
    assert world.faults.calls.count("Upload") > 1


async def test_the_time_in_which_an_upload_makes_progress_does_not_count_as_silence(world: World) -> None:
    path = world.folder / "update"
    artifact = _file(path, 5 * CHUNK_SIZE)
    world.breaks_after(4, slow_s=0.3)
    await world.client(reconnect_timeout_s=0.6).upload(SESSION, path, artifact)
    assert world.store.has(artifact)
    assert world.faults.calls.count("Upload") == 2


# Downloads.


@pytest.fixture
def adapter(world: World) -> Artifact:
    """A global adapter of five chunks and a bit, at the coordinator."""
    artifact = _file(world.folder / "source", 5 * CHUNK_SIZE + 7)
    world.store.adopt(world.folder / "source", artifact)
    world.adapters[0] = artifact
    return artifact


def _fetched(world: World, adapter: Artifact) -> bool:
    """Whether the download is there, whole and alone."""
    names = {path.name for path in world.folder.iterdir()}
    return names == {"artifacts", "fetched"} and Artifact.of_file(world.folder / "fetched") == adapter


async def test_a_download_arrives_whole(world: World, adapter: Artifact) -> None:
    await world.client().download(SESSION, adapter, world.folder / "fetched")
    assert _fetched(world, adapter)
    assert world.store.downloads == [0]


async def test_a_download_goes_on_where_the_connection_broke(world: World, adapter: Artifact) -> None:
    partial = world.folder / "fetched.partial"
    world.breaks_after(3, lambda: partial.stat().st_size >= 2 * CHUNK_SIZE)
    await world.client().download(SESSION, adapter, world.folder / "fetched")
    assert _fetched(world, adapter)
    first, second = world.store.downloads
    assert first == 0
    assert 2 * CHUNK_SIZE <= second <= 3 * CHUNK_SIZE


async def test_the_time_in_which_a_download_makes_progress_does_not_count_as_silence(
    world: World, adapter: Artifact
) -> None:
    partial = world.folder / "fetched.partial"
    world.breaks_after(4, lambda: partial.stat().st_size >= 3 * CHUNK_SIZE, slow_s=0.3)
    await world.client(reconnect_timeout_s=0.6).download(SESSION, adapter, world.folder / "fetched")
    assert _fetched(world, adapter)
    assert len(world.store.downloads) == 2


async def test_a_download_of_a_restarted_site_goes_on_too(world: World, adapter: Artifact) -> None:
    content = world.store.path(adapter).read_bytes()
    for size in (1, 2 * CHUNK_SIZE + 1, adapter.size):
        (world.folder / "fetched.partial").write_bytes(content[:size])
        await world.client().download(SESSION, adapter, world.folder / "fetched")
        assert world.store.downloads.pop() == size
        assert _fetched(world, adapter)


@pytest.mark.parametrize("size", [1, CHUNK_SIZE, 5 * CHUNK_SIZE + 7, 9 * CHUNK_SIZE])
async def test_a_download_onto_other_bytes_is_made_again(world: World, adapter: Artifact, size: int) -> None:
    (world.folder / "fetched.partial").write_bytes(bytes(size))
    await world.client().download(SESSION, adapter, world.folder / "fetched")
    assert _fetched(world, adapter)
    assert world.store.downloads == ([size, 0] if size <= adapter.size else [0])


async def test_a_download_replaces_what_was_there(world: World, adapter: Artifact) -> None:
    (world.folder / "fetched").write_text("an older adapter")
    await world.client().download(SESSION, adapter, world.folder / "fetched")
    assert _fetched(world, adapter)


async def test_a_download_that_is_wrong_twice_is_an_error_and_leaves_what_was_there(
    world: World, adapter: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nor is the site's own check left to the coordinator's.
    monkeypatch.setattr(world.store, "verified", world.store.path)
    world.store.path(adapter).write_bytes(bytes(adapter.size))
    (world.folder / "fetched").write_text("an older adapter")
    with pytest.raises(ArtifactError, match="has another digest"):
        await world.client().download(SESSION, adapter, world.folder / "fetched")
    assert world.store.downloads == [0, 0]
    assert (world.folder / "fetched").read_text() == "an older adapter"


async def test_a_download_of_a_damaged_adapter_waits_until_it_has_been_put_back(
    world: World, adapter: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, seen = world.store.path(adapter).read_bytes(), threading.Event()
    verified = world.store.verified

    def noted(artifact: Artifact) -> Path:
        try:
            return verified(artifact)
        except DamagedArtifact:
            seen.set()
            raise

    monkeypatch.setattr(world.store, "verified", noted)
    world.store.path(adapter).write_bytes(content[:-1] + b"?")
    download = asyncio.create_task(world.client().download(SESSION, adapter, world.folder / "fetched"))
    assert await asyncio.to_thread(seen.wait, 20)
    assert not (world.folder / "fetched.partial").stat().st_size
    world.store.path(adapter).write_bytes(content)
    await download
    assert _fetched(world, adapter)


async def test_a_download_of_what_the_coordinator_does_not_have_is_an_error(world: World) -> None:
    with pytest.raises(ArtifactError, match="there is no such global adapter"):
        await world.client().download(SESSION, Artifact("0" * 64, 5), world.folder / "fetched")
    assert not (world.folder / "fetched").exists()
