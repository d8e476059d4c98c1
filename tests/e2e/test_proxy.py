"""Proxy variables in the environment of a site, an operator and a probe, with a real coordinator on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support.doctor import doctor, states
from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dead() -> str:
    """A proxy's address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def proxy_to_coordinator(port: int) -> Iterator[str]:
    """An HTTP proxy that leads every CONNECT to the coordinator's port; yields its HOST:PORT."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError), socket.create_connection(("127.0.0.1", port)) as inside:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += connection.recv(1)
            assert request.startswith(b"CONNECT ")
            connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            threading.Thread(target=pump, args=(inside, connection), daemon=True).start()
            pump(connection, inside)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        accepting.join()


def site(federation: Federation, environment: dict[str, str], *flags: str, server: str | None = None) -> Daemon:
    federation.environment = environment
    data = write_rows(federation.folder / "a.jsonl", {"a": 4})
    return federation.client("a", f"--data={data}", *flags, server=server)


@pytest.mark.parametrize(
    "variable", ["grpc_proxy", *(pytest.param(name, marks=pytest.mark.long) for name in ("https_proxy", "http_proxy"))]
)
def test_a_proxy_in_the_way_is_named_with_what_to_set(federation: Federation, dead: str, variable: str) -> None:
    federation.server("--rounds=1", "--min-sites=2")
    address = federation.address()
    environment = {variable: f"http://name:secret@{dead}", "NO_PROXY": "127.0.0.1"}
    words = f"{address} answers directly, but gRPC uses the proxy in ${variable} ({dead}), where it failed ("
    remedy = "add 127.0.0.1 to the variable no_proxy (in lower case: gRPC does not read NO_PROXY)"
    client = site(federation, environment, "--reconnect-timeout=2")
    assert client.wait() == 1
    status = federation.start("status", "fedhds", "status", f"--server={address}")
    assert status.wait() == 1
    looked = doctor(f"--server={address}", **environment)
    assert (looked.returncode, states(looked)["server"]) == (1, "failed")
    for text in (client.text, status.text, looked.stdout):
        assert words in text
        assert remedy in text
        assert "secret" not in text
        assert "Traceback" not in text
    # The probe of the same container is not led astray, and what the remedy says is a cure.
    health = federation.start("health", "fedhds", "health", f"--listen={address}")
    assert (health.wait(), health.text) == (0, "SERVING\n")
    cured = environment | {"no_proxy": "127.0.0.1"}
    site(federation, cured).wait_for("enrolled")
    assert doctor(f"--server={address}", **cured).returncode == 0


def test_a_proxy_that_is_in_nobodys_way_is_not_blamed(federation: Federation, dead: str) -> None:
    """The coordinator is not there directly either, or the variable does not concern it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        nobody = f"127.0.0.1:{server.getsockname()[1]}"
    client = site(federation, {"http_proxy": f"http://{dead}"}, "--reconnect-timeout=1", server=nobody)
    assert client.wait() == 1
    assert f"nothing listens on {nobody}" in client.text
    assert "gRPC itself uses the proxy in $http_proxy" in client.text
    assert "answers directly" not in client.text
    exempt = {"http_proxy": f"http://{dead}", "no_proxy": "127.0.0.1"}
    client = site(federation, exempt, "--reconnect-timeout=1", server=nobody)
    assert client.wait() == 1
    assert "gRPC itself uses" not in client.text


def test_a_coordinator_that_only_the_proxy_reaches_is_reached(federation: Federation) -> None:
    federation.server("--rounds=1", "--min-sites=2")
    with proxy_to_coordinator(int(federation.address().rpartition(":")[2])) as proxy:
        environment = {"https_proxy": f"http://{proxy}"}
        server = "coordinator.invalid:8470"
        looked = doctor(f"--server={server}", **environment)
        assert states(looked)["server"] == "ok", looked.stdout
        site(federation, environment, server=server).wait_for("enrolled")
        federation.stop()
