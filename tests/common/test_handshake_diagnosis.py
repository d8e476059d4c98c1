"""Why no connection comes about: every diagnosis, made against a real server or socket."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from fedhds.security.credentials import TlsFiles, channel_credentials, diagnose_handshake, server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from tests.support.tls_servers import is_refused, issue_dated, lax_server, serving


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


@pytest.fixture
def site(folder: Path) -> TlsFiles:
    return issue(folder, "hospital-a", role=Role.SITE)


@pytest.fixture
def coordinator(folder: Path) -> TlsFiles:
    return issue(folder, "coordinator", role=Role.COORDINATOR)


@pytest.fixture
def stranger(tmp_path: Path) -> TlsFiles:
    """A site of another federation, whose authority has the same name."""
    return issue(init_authority(tmp_path / "elsewhere").parent, "hospital-a", role=Role.SITE)


@asynccontextmanager
async def listening(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[str]:
    """Something that is no gRPC server; yields its HOST:PORT."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _speak_http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    await writer.drain()


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(-1)


async def _diagnose(target: str, files: TlsFiles | None, timeout_s: float = 5.0) -> str:
    return await asyncio.to_thread(diagnose_handshake, target, files, timeout_s) or "nothing is wrong"


async def test_all_is_well(site: TlsFiles, coordinator: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        assert await asyncio.to_thread(diagnose_handshake, server.target, site, 5.0) is None
        assert await asyncio.to_thread(diagnose_handshake, f"dns:///{server.target}", site, 5.0) is None
    async with serving(None) as server:
        assert await asyncio.to_thread(diagnose_handshake, server.target, None, 5.0) is None


def test_unix_sockets_are_left_alone() -> None:
    assert diagnose_handshake("unix:///run/fedhds.sock", None) is None


def test_the_host_name_cannot_be_resolved() -> None:
    assert "no-such-host.invalid cannot be resolved" in str(diagnose_handshake("no-such-host.invalid:1", None))
    assert "cannot be resolved" in str(diagnose_handshake(f"{'x' * 70}.example:1", None))


@pytest.mark.parametrize("target", ["http://localhost:50051", "localhost:50051/", "a:port", "a:65536", "", ":1"])
def test_the_address_is_malformed(target: str) -> None:
    assert "not of the form HOST:PORT" in str(diagnose_handshake(target, None))


def test_nothing_listens(site: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = f"127.0.0.1:{server.getsockname()[1]}"
    assert f"nothing listens on {target}" in str(diagnose_handshake(target, None))
    assert f"nothing listens on {target}" in str(diagnose_handshake(target, site))
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    assert "the proxy in $https_proxy" in str(diagnose_handshake(target, site))


@pytest.mark.parametrize("with_tls", [False, True])
async def test_the_server_accepts_and_says_nothing(site: TlsFiles, with_tls: bool) -> None:
    async with listening(_say_nothing) as target:
        assert "does not answer within 0.2 s" in await _diagnose(target, site if with_tls else None, 0.2)


async def test_the_server_speaks_tls_but_no_flags_were_given(coordinator: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        assert "speaks TLS, but no --tls-* flags" in await _diagnose(server.target, None)


async def test_the_server_does_not_speak_tls(site: TlsFiles) -> None:
    async with serving(None) as server:
        assert "does not speak TLS; drop --tls-ca" in await _diagnose(server.target, site)


async def test_the_coordinator_is_of_another_authority(coordinator: TlsFiles, stranger: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        assert "is not from the authority in" in await _diagnose(server.target, stranger)


@pytest.mark.parametrize("dialed", ["127.0.0.1", "localhost"])
async def test_the_coordinators_certificate_names_another_host(folder: Path, site: TlsFiles, dialed: str) -> None:
    files = issue(folder, "c", role=Role.COORDINATOR, hosts=["fed.example.org", "10.0.0.7"])
    async with serving(server_credentials(files)) as server:
        target = server.target.replace("127.0.0.1", dialed)
        await is_refused(target, channel_credentials(site))
        reason = await _diagnose(target, site)
    assert f"does not name the host {dialed}" in reason
    assert f"--renew --host {dialed}" in reason


@pytest.mark.parametrize(("starts", "ends", "reason"), [(-9, -1, "has expired"), (1, 9, "is not valid yet")])
async def test_the_coordinators_certificate_is_out_of_its_time(
    folder: Path, site: TlsFiles, monkeypatch: pytest.MonkeyPatch, starts: int, ends: int, reason: str
) -> None:
    files = issue_dated(monkeypatch, folder, "c", Role.COORDINATOR, starts, ends)
    async with serving(lax_server(files)) as server:
        assert f"the coordinator's certificate {reason}" in await _diagnose(server.target, site)


async def test_the_server_is_a_site_that_poses_as_the_coordinator(folder: Path, site: TlsFiles) -> None:
    other = issue(folder, "hospital-b", role=Role.SITE)
    async with serving(lax_server(other)) as server:
        assert "not a coordinator's" in await _diagnose(server.target, site)


async def test_the_coordinator_refuses_our_certificate(
    site: TlsFiles, coordinator: TlsFiles, stranger: TlsFiles
) -> None:
    async with serving(lax_server(coordinator, trusts=stranger)) as server:
        reason = await _diagnose(server.target, site)
        assert f"your certificate {site.cert} was refused by {server.target}" in reason


async def test_our_own_certificate_has_expired_since(
    folder: Path, coordinator: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = issue_dated(monkeypatch, folder, "late", Role.SITE, -9, -1)
    async with serving(server_credentials(coordinator)) as server:
        assert "expired on" in await _diagnose(server.target, expired)


@pytest.mark.parametrize("with_tls", [False, True])
@pytest.mark.parametrize("answer", [_speak_http1, _hang_up])
async def test_the_port_is_not_the_coordinators(
    site: TlsFiles, with_tls: bool, answer: Callable[..., Awaitable[None]]
) -> None:
    async with listening(answer) as target:
        assert "but not as a coordinator" in await _diagnose(target, site if with_tls else None)


async def test_the_port_is_a_web_servers_with_tls(site: TlsFiles, coordinator: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(coordinator.cert, coordinator.key)
    async with listening(_speak_http1, context) as target:
        assert "but not as a coordinator" in await _diagnose(target, site)
        assert "speaks TLS, but no --tls-* flags" in await _diagnose(target, None)


@contextmanager
def accepting(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """A plain socket whose every connection `answer` gets, in a thread; yields its HOST:PORT."""
    stopped = threading.Event()

    def accept() -> None:
        while not stopped.is_set():
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        server.settimeout(0.05)
        threads.submit(accept)
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            stopped.set()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_alert_about_our_certificate_is_passed_on(
    site: TlsFiles, coordinator: TlsFiles, stranger: TlsFiles, version: ssl.TLSVersion
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.load_cert_chain(coordinator.cert, coordinator.key)
    context.load_verify_locations(stranger.ca)
    context.verify_mode = ssl.CERT_REQUIRED

    def refuse(connection: socket.socket) -> None:
        # Reads to the end, for a close over unread bytes would reset the connection and may lose the alert.
        with connection.dup() as kept:
            with suppress(ssl.SSLError):
                context.wrap_socket(connection, server_side=True).recv(1)
            kept.shutdown(socket.SHUT_WR)
            while kept.recv(4096):
                pass

    # A thread, for asyncio's server hangs up on a failed handshake without sending its alert.
    with accepting(refuse) as target:
        assert "(tlsv1 alert unknown ca)" in str(diagnose_handshake(target, site))
        assert "speaks TLS, but no --tls-* flags" in str(diagnose_handshake(target, None))


def test_a_reset_after_the_handshake_is_a_refusal(site: TlsFiles, coordinator: TlsFiles) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(coordinator.cert, coordinator.key)

    def reset(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(1)
            secure.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with accepting(reset) as target:
        assert f"was refused by {target} (it closed the connection)" in str(diagnose_handshake(target, site))
