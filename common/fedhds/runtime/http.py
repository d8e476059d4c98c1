"""What a daemon answers over HTTP: /metrics, /healthz, /readyz."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from prometheus_client import disable_created_metrics
from prometheus_client.core import Metric
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedhds.errors import SettingsError
from fedhds.runtime.metrics import exposition
from fedhds.settings import is_loopback

logger = logging.getLogger(__name__)

# Scrapes and probes come one at a time, and the status page bounds its own; beyond that number they wait.
_MAX_CONNECTIONS = 100
_LAST_ANSWERS_S = 1
# Browsers open connections ahead of their requests, and slow links take seconds for an answer; a connection on which
# nothing at all moves for this long is of no use to anybody.
_UNUSED_S = 10.0
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9.-]+)(:[0-9]+)?")

# Read on the event loop, where the state is whole; cheap.
Families = Callable[[], Sequence[Metric]]
# What keeps the process from being ready, by kind.
Problems = Callable[[], Mapping[str, str]]


@asynccontextmanager
async def served(
    address: str, families: Families, problems: Problems, routes: Collection[BaseRoute] = ()
) -> AsyncIterator[str]:
    """Answers on `address` (HOST:PORT; port 0 takes a free one) within the caller's event loop; gives the URL.

    /healthz is answered by the loop itself: no answer within the prober's timeout means that it stands still.
    Raises SettingsError when the address cannot be had.
    """
    host = address.rpartition(":")[0]

    async def metrics(request: Request) -> Response:
        if refusal := misdirected(request, loopback=is_loopback(host)):
            return refusal
        read = families()
        # The process's own figures are files to read.
        content, media_type = await asyncio.to_thread(exposition, read, request.headers.get("accept", ""))
        return Response(content, headers={"content-type": media_type})

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("alive\n")

    async def readyz(request: Request) -> Response:
        current = problems()
        text = "".join(f"{kind}: {problem}\n" for kind, problem in current.items())
        return PlainTextResponse(text or "ready\n", status_code=503 if current else 200)

    # The time at which each counter was made: as many series again, for nothing that is asked here.
    disable_created_metrics()
    own = [Route(f"/{endpoint.__name__}", endpoint) for endpoint in (metrics, healthz, readyz)]
    config = uvicorn.Config(
        Starlette(routes=[*own, *routes]),
        http=_Connection,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_ANSWERS_S,
    )
    listener = _bound(address)
    port = listener.getsockname()[1]
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    logger.info("metrics at http://%s:%d/metrics", host, port)
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        await serving


def misdirected(request: Request, *, loopback: bool) -> Response | None:
    """On loopback, the answer to a request that names another host; None for all others.

    A site in a browser on this machine could otherwise point its own name at 127.0.0.1 and read what is here.
    """
    # The header itself: a URL made of it falls back to the socket's own address where it is odd.
    named = _HOST.fullmatch(request.headers.get("host", ""))
    if not loopback or (named and is_loopback(named[1].strip("[]"))):
        return None
    return PlainTextResponse("ask for 127.0.0.1 or localhost\n", status_code=421)


class _Connection(H11Protocol):
    """A connection that is closed when nobody uses it: uvicorn's own time limit begins with the first answer only.

    It is unused when for `_UNUSED_S` seconds no request begins, or nothing is taken of an answer. Where the port is
    full, a new connection takes the place of the oldest one without a request, so that silent ones keep nobody out.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= _MAX_CONNECTIONS - 1:
            silent = [one for one in self.connections if isinstance(one, _Connection) and one._silent]
            if silent:
                oldest = min(silent, key=lambda one: one._opened_at)
                self.connections.discard(oldest)
                oldest.transport.abort()
        super().connection_made(transport)
        self._opened_at = self.loop.time()
        self._last = self._progress
        self._looking = self.loop.call_later(_UNUSED_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._looking.cancel()
        super().connection_lost(exc)

    @property
    def _silent(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or bool(self.cycle.response_complete)

    @property
    def _progress(self) -> tuple[object, int]:
        """The last request, and the bytes that wait to be taken."""
        return self.cycle, self.transport.get_write_buffer_size()

    def _look(self) -> None:
        before, self._last = self._last, self._progress
        if before == self._last and (self._silent or self._last[1]):
            self.transport.abort()
        else:
            self._looking = self.loop.call_later(_UNUSED_S, self._look)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the daemon."""
        yield


def _bound(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=family)
    except OSError as error:
        raise SettingsError("--http", f"cannot listen on {address}: {error.strerror or error}") from error
