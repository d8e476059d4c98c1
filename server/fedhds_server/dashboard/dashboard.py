"""The status page: what `fedhds status` tells, once a second to everybody who looks, and the files that show it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fedhds import __version__
from fedhds.errors import StorageError
from fedhds.runtime.http import misdirected
from fedhds.status import status_dict
from fedhds_server.leadership.gate import LeaderGate
from fedhds_server.leadership.leadership import Leadership
from fedhds_server.selection.record import abridged_selection
from fedhds_server.status import status_of

Status = dict[str, Any]

# Of the hundred connections that the port has; scrapes and probes keep the others.
MAX_STREAMS = 20
# Of sites, rounds and evaluations; a page of more is read by nobody, and what goes out each second stays small.
_MAX_LISTED = 200
_EVERY_S = 1.0
# A page asks for the next stream by itself. One that is stalled (a browser that sleeps) does not, and the kernel would
# take events for it for many minutes before anybody noticed.
_STREAM_S = 120.0
_RETRY_S = 2
_FILES = {"/": "index.html"} | {f"/{name}": name for name in ("page.css", "page.js", "drawing.js", "icon.svg")}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_HEADERS = {
    # Whatever a site wrote into its error: no script but the page's own runs, and nothing is loaded from or sent to
    # anywhere else. Trusted types leave no way from text to markup.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


class Dashboard:
    """Read-only. The status is taken at most once a second, however many look, and not at all while nobody does.

    On loopback (`loopback`) only requests to a loopback name are answered.
    """

    def __init__(self, gate: LeaderGate, leadership: Leadership, *, loopback: bool) -> None:
        self._gate = gate
        self._leadership = leadership
        self._loopback = loopback
        self._closing = asyncio.Event()
        self._streams = 0
        self._taking = asyncio.Lock()
        self._taken: tuple[float, Status] = (-math.inf, {})
        self._reading = asyncio.Lock()
        self._read: tuple[object, bytes] = (None, b"")
        folder = files("fedhds_server") / "dashboard"
        contents = {path: (folder / name).read_bytes() for path, name in _FILES.items()}

        def file(path: str) -> Callable[[Request], Awaitable[Response]]:
            async def endpoint(request: Request) -> Response:
                return Response(contents[path], media_type=_TYPES[_FILES[path].rpartition(".")[2]])

            return endpoint

        endpoints = {path: file(path) for path in _FILES}
        endpoints |= {"/events": self._events, "/selection.json": self._selection}
        self.routes = [Route(path, self._guarded(endpoint)) for path, endpoint in endpoints.items()]

    def close(self) -> None:
        """Ends the streams, so that nobody waits for them."""
        self._closing.set()

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            if refusal := misdirected(request, loopback=self._loopback):
                return refusal
            response = await endpoint(request)
            response.headers.update(_HEADERS)
            return response

        return guarded

    async def _events(self, request: Request) -> Response:
        if self._streams >= MAX_STREAMS:
            return PlainTextResponse(
                f"{MAX_STREAMS} others look at this page; close one of them\n", 503, {"retry-after": str(_RETRY_S)}
            )
        self._streams += 1
        # A browser that connects again by itself sends the header; a page that does, the parameter.
        last = request.headers.get("last-event-id") or request.query_params.get("after", "")
        return _Stream(self._told(last), self._ended)

    def _ended(self) -> None:
        self._streams -= 1

    async def _told(self, last: str) -> AsyncIterator[str]:
        """Server-sent events: the whole status, then what has changed in it; and the journal after the line `last`.

        A line's id has its run, number and time. Where the journal has no such line, it is not the one that the page
        shows (a backup was restored, or too many lines have come since): "history" says that it starts again.
        """
        yield f"retry: {1000 * _RETRY_S}\n\n"
        previous: Status | None = None
        until = time.monotonic() + _STREAM_S
        while not self._closing.is_set():
            if time.monotonic() > until:
                yield _event("again", {})
                return
            status = dict(await self._status())
            journal, run = status.pop("journal", []), status.get("run_id", "")
            if previous is None or run != previous.get("run_id", ""):
                yield _event("snapshot", status)
            else:
                # Every second, if only to say that nothing has.
                changed = {key for key in status.keys() | previous.keys() if status.get(key) != previous.get(key)}
                yield _event("changes", {key: status.get(key) for key in changed})
            lines = {f"{run}/{line['number']}/{line['at']}": line for line in journal}
            if run and last and last not in lines:
                last = ""
                yield _event("history", {})
            names = list(lines)
            for name in names[names.index(last) + 1 if last in lines else 0 :]:
                last = name
                yield f"id: {name}\n" + _event("line", lines[name])
            previous = status
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _EVERY_S)

    async def _status(self) -> Status:
        async with self._taking:
            if time.monotonic() - self._taken[0] >= _EVERY_S:
                self._taken = (time.monotonic(), await self._now())
            return self._taken[1]

    async def _now(self) -> Status:
        own: Status = {"version": __version__, "problems": self._gate.problems}
        coordinator = self._gate.coordinator
        if coordinator is None:
            return own | {"leader": self._leadership.leader}
        # Everybody who looks should see the end.
        coordinator.timers.watched()
        own["selection"] = coordinator.effects.newest_selection
        status = status_of(
            coordinator.state,
            coordinator.checkpoint,
            coordinator.journal,
            deadline_s=coordinator.timers.deadline_s,
            warnings=coordinator.warnings,
            limit=_MAX_LISTED,
        )
        return own | await asyncio.to_thread(status_dict, status)

    async def _selection(self, request: Request) -> Response:
        coordinator = self._gate.coordinator
        number = coordinator.effects.newest_selection if coordinator else None
        if coordinator is None or number is None:
            return PlainTextResponse("there is no selection in this coordinator's run folder\n", 404)
        async with self._reading:
            name = (coordinator.state.run_id, number)
            if self._read[0] != name:
                try:
                    content = await asyncio.to_thread(abridged_selection, coordinator.folder, number)
                except StorageError as error:
                    return PlainTextResponse(f"{error}\n", 503)
                self._read = (name, json.dumps(content).encode())
        return Response(self._read[1], media_type="application/json")


class _Stream(StreamingResponse):
    """Server-sent events; `ended` is called when nothing is sent any more, for whatever reason."""

    def __init__(self, events: AsyncIterator[str], ended: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def _event(kind: str, content: Status) -> str:
    # In JSON every line break is escaped.
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n"
