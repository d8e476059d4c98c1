"""Real servers and callers for the tests of identity: gRPC on port 0, with TLS as given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedhds.security import pki
from fedhds.security.credentials import TlsFiles
from fedhds.security.identity import PeerIdentity, Role, identity_of
from fedhds.security.pki import issue

DAY = timedelta(days=1)


def issue_dated(patch: pytest.MonkeyPatch, folder: Path, name: str, role: Role, starts: int, ends: int) -> TlsFiles:
    """A certificate that is valid from `starts` to `ends`, in days from now."""
    now = datetime.now(UTC).replace(microsecond=0)
    with patch.context() as dated:
        dated.setattr(pki, "_validity", lambda days: (now + starts * DAY, now + ends * DAY))
        return issue(folder, name, role=role)


@dataclass
class Listener:
    """A server under test: where it listens and whom its handler has seen."""

    target: str
    seen: list[PeerIdentity | None] = field(default_factory=list)


@asynccontextmanager
async def serving(credentials: Any | None) -> AsyncIterator[Listener]:
    """A gRPC server with one method, which notes the caller's identity; None serves in the clear."""
    listener = Listener("")

    async def whoami(request: bytes, context: Any) -> bytes:
        listener.seen.append(identity_of(context.auth_context()))
        return request

    server = grpc.aio.server()
    methods = {"WhoAmI": grpc.unary_unary_rpc_method_handler(whoami)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", methods),))
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    listener.target = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield listener
    finally:
        await server.stop(None)


async def call(target: str, credentials: Any | None) -> bytes:
    tls = credentials is not None
    async with grpc.aio.secure_channel(target, credentials) if tls else grpc.aio.insecure_channel(target) as channel:
        answer = await channel.unary_unary("/test.Test/WhoAmI")(b"me", timeout=20)
        return bytes(answer)


async def is_refused(target: str, credentials: Any | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(target, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def lax_server(files: TlsFiles, *, trusts: TlsFiles | None = None) -> Any:
    """Server credentials without the checks of `server_credentials`."""
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    return grpc.ssl_server_credentials([pair], (trusts or files).ca.read_bytes(), require_client_auth=True)


def lax_client(files: TlsFiles, *, trusts: TlsFiles | None = None) -> Any:
    pem = files.key.read_bytes(), files.cert.read_bytes()
    return grpc.ssl_channel_credentials((trusts or files).ca.read_bytes(), *pem)
