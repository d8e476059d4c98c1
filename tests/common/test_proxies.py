"""Which proxy stands before a coordinator, as gRPC itself behaves with the same environment."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator

import grpc
import pytest

from fedhds.runtime.proxies import bypass, proxy_to
from tests.support.tls_servers import serving


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def dead() -> str:
    """A proxy's address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
async def port() -> AsyncIterator[str]:
    async with serving(None) as server:
        yield server.target.rpartition(":")[2]


def _is_reached(target: str) -> bool:
    with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            channel.unary_unary("/test.Test/WhoAmI")(b"", timeout=10)
        except grpc.RpcError:
            return False
    return True


@pytest.mark.parametrize(
    ("host", "variables", "variable"),
    [
        ("127.0.0.1", {}, None),
        ("127.0.0.1", {"http_proxy": "http://DEAD"}, "http_proxy"),
        ("localhost", {"https_proxy": "http://DEAD"}, "https_proxy"),
        ("127.0.0.1", {"grpc_proxy": "http://name:secret@DEAD/", "http_proxy": "nonsense"}, "grpc_proxy"),
        ("127.0.0.1", {"grpc_proxy": "", "http_proxy": "http://DEAD"}, None),
        ("127.0.0.1", {"HTTP_PROXY": "http://DEAD", "HTTPS_PROXY": "http://DEAD", "GRPC_PROXY": "http://DEAD"}, None),
        ("127.0.0.1", {"all_proxy": "http://DEAD"}, None),
        ("127.0.0.1", {"http_proxy": "DEAD"}, None),
        ("127.0.0.1", {"http_proxy": "socks5://DEAD"}, None),
        ("127.0.0.1", {"http_proxy": "https://DEAD"}, None),
        ("127.0.0.1", {"http_proxy": "HTTP://DEAD"}, "http_proxy"),
        ("127.0.0.1", {"http_proxy": "http://"}, None),
        ("127.0.0.1", {"http_proxy": " http://DEAD"}, None),
        ("127.0.0.1", {"http_proxy": "http://DEAD/path?query"}, "http_proxy"),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "no_proxy": "example.org, 127.0.0.1"}, None),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "no_proxy": "127.0.0.0/8"}, None),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "no_proxy": "10.0.0.0/8,localhost"}, "http_proxy"),
        ("localhost", {"http_proxy": "http://DEAD", "no_proxy": "LocalHost"}, None),
        ("localhost", {"http_proxy": "http://DEAD", "no_proxy": "host,127.0.0.1,127.0.0.0/8"}, "http_proxy"),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "no_proxy": "*"}, "http_proxy"),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "NO_PROXY": "127.0.0.1"}, "http_proxy"),
        ("127.0.0.1", {"http_proxy": "http://DEAD", "no_proxy": "127.0.0.1", "no_grpc_proxy": "x"}, "http_proxy"),
    ],
)
async def test_the_proxy_that_is_named_is_the_one_that_grpc_uses(
    monkeypatch: pytest.MonkeyPatch, port: str, dead: str, host: str, variables: dict[str, str], variable: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("DEAD", dead))
    assert proxy_to(host) == ((variable, dead) if variable else None)
    assert await asyncio.to_thread(_is_reached, f"{host}:{port}") is (variable is None)


def test_what_to_set_is_what_grpc_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bypass("[::1]") == "add ::1 to the variable no_proxy"
    monkeypatch.setenv("NO_PROXY", "10.0.0.5")
    assert bypass("10.0.0.5") == ("add 10.0.0.5 to the variable no_proxy (in lower case: gRPC does not read NO_PROXY)")
    monkeypatch.setenv("no_grpc_proxy", "")
    assert bypass("10.0.0.5") == "add 10.0.0.5 to the variable no_grpc_proxy"
