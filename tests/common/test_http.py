"""What a daemon's HTTP port does with connections that nobody uses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedhds.runtime import http
from fedhds.runtime.http import served


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)


async def asked(url: str, path: str = "/healthz") -> bytes:
    """The answer's first line."""
    reader, writer = await connect(url)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    line = await asyncio.wait_for(reader.readline(), 20)
    writer.close()
    return line


async def gone(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 20) == b""
    except ConnectionResetError:
        return True


async def test_silent_connections_keep_nobody_out() -> None:
    async with served("127.0.0.1:0", list, dict) as url:
        silent = [await connect(url) for _ in range(130)]
        # Half a request is none.
        for _, writer in silent[50:]:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost:")
        for _ in range(5):
            assert b" 200 " in await asked(url)
        assert await gone(silent[0][0])
        for _, writer in silent:
            writer.close()


async def test_a_connection_on_which_no_request_begins_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_UNUSED_S", 0.5)
    async with served("127.0.0.1:0", list, dict) as url:
        began = asyncio.get_running_loop().time()
        reader, writer = await connect(url)
        assert await gone(reader)
        assert asyncio.get_running_loop().time() - began > 0.4
        writer.close()
        # Nor does one begin whose headers never end.
        reader, writer = await connect(url)
        writer.write(b"GET /healthz HTTP/1.1\r\n")
        dripping = asyncio.create_task(drip(writer))
        assert await gone(reader)
        dripping.cancel()
        writer.close()


async def drip(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def test_an_answer_that_nobody_takes_is_given_up_and_a_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_UNUSED_S", 0.5)
    ended = asyncio.Event()

    async def endless(request: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield bytes(1 << 16)
                    await asyncio.sleep(0)
            finally:
                ended.set()

        return StreamingResponse(pieces())

    async def slow(request: Request) -> Response:
        await asyncio.sleep(2)
        return Response(b"slow")

    async with served("127.0.0.1:0", list, dict, [Route("/endless", endless), Route("/slow", slow)]) as url:
        reader, writer = await connect(url)
        writer.write(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readline()
        assert b" 200 " in await asked(url, "/slow")
        await asyncio.wait_for(ended.wait(), 20)
        writer.close()
