"""The gRPC server as every coordinator has it: its limits, and requests that are no messages answered as such."""

from __future__ import annotations

import asyncio
import inspect
import resource
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedhds.errors import FedhdsError, RequestError
from fedhds.grpc_errors import abort
from fedhds_server.rpc.limits import MAX_MESSAGE, Leading, Limits, Place, usual_length

# A host that vanished leaves its connection behind, which TCP alone gives up after hours.
_IDLE_S, _PING_ANSWER_S = 30, 10
# A site always has a call open or makes one every few seconds, and comes back when it finds its connection closed.
_UNUSED_S, _HANDSHAKE_S = 300, 10
# Connections at most, and of the files that the process may have open: the others are for the run itself.
_MAX_CONNECTIONS, _CONNECTION_SHARE = 1 << 16, 0.75
# A site behind a NAT or a load balancer loses idle connections after about a minute; calls are long polls of up to
# 30 s. It pings every 10 s, which is allowed without being taken for abuse. A site may send 64 KiB more than the chunk
# that is asked for (1 MiB for few sites: 10 MB/s at a round trip of 100 ms); gRPC's own estimate grows with fast links,
# and made each uploading site cost 7 MB of memory.
_OPTIONS = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 16),
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 1000 * _IDLE_S),
    ("grpc.keepalive_timeout_ms", 1000 * _PING_ANSWER_S),
    ("grpc.max_connection_idle_ms", 1000 * _UNUSED_S),
    ("grpc.server_handshake_timeout_ms", 1000 * _HANDSHAKE_S),
    # Without it gRPC waits a minute where TCP still answers, as behind a relay.
    ("grpc.http2.ping_timeout_ms", 1000 * _PING_ANSWER_S),
)


def new_server(leading: Leading) -> grpc.aio.Server:
    """A server without services and ports."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = ("grpc.max_allowed_incoming_connections", min(int(files * _CONNECTION_SHARE), _MAX_CONNECTIONS))
    return grpc.aio.server(options=(*_OPTIONS, connections), interceptors=(_Decoding(Limits(leading)),))


class _Decoding(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Reads and decodes requests within `Limits`, in the place of grpcio, which answers bytes that are no message with
    UNKNOWN and the library's exception, and a call that ends without any message never.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        name = handler_call_details.method
        if name not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            self._handlers[name] = _decoding(handler, name, self._limits)
        return self._handlers[name]


def _decoding(handler: grpc.RpcMethodHandler, name: str, limits: Limits) -> grpc.RpcMethodHandler:
    """The same method, reading its requests as a stream of bytes."""
    decode, usual = handler.request_deserializer, usual_length(name)

    async def argument(requests: AsyncGenerator[bytes, None], context: grpc.aio.ServicerContext, place: Place) -> Any:
        """What the method takes: its request, or all of them. A large request keeps its place until it is answered."""
        await place.read()
        raw = await anext(requests, None)
        if raw is None:
            return await abort(context, RequestError("the call ended before its request had come"))
        if handler.request_streaming:
            place.leave()
            return messages(raw, requests, context)
        if len(raw) > usual:
            # It would keep the bytes beside the message.
            await requests.aclose()
            return await decoded(raw, context, place)
        message = await decoded(raw, context)
        place.leave()
        return message

    async def messages(
        first: bytes, others: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Any]:
        yield await decoded(first, context)
        async for raw in others:
            yield await decoded(raw, context)

    async def decoded(raw: bytes, context: grpc.aio.ServicerContext, place: Place | None = None) -> Any:
        try:
            if len(raw) > usual:
                limits.check_large(name, raw, context)
            if place is None:
                return decode(raw)
            await place.decode()
            return await asyncio.to_thread(decode, raw)
        except DecodeError:
            return await abort(context, RequestError("the bytes of a request are no message of this method"))
        except FedhdsError as error:
            return await abort(context, error)

    async def stream(requests: Any, context: grpc.aio.ServicerContext) -> None:
        method = handler.stream_stream or handler.unary_stream
        place, incoming = await limits.place(name, context), aiter(requests)
        try:
            responses = method(await argument(incoming, context, place), context)
            if inspect.isawaitable(responses):
                await responses
                return
            async for response in responses:
                try:
                    await context.write(response)
                except grpc.aio.InternalError:
                    # The connection is gone: grpcio would log that as our exception, with a traceback.
                    raise asyncio.CancelledError from None
        except grpc.aio.AbortError as error:
            raise _light(error) from None
        finally:
            place.leave()
            # Left to the collector, it would keep the last message for long.
            await incoming.aclose()

    async def unary(requests: Any, context: grpc.aio.ServicerContext) -> Any:
        method = handler.stream_unary or handler.unary_unary
        place, incoming = await limits.place(name, context), aiter(requests)
        try:
            return await method(await argument(incoming, context, place), context)
        except grpc.aio.AbortError as error:
            raise _light(error) from None
        finally:
            place.leave()
            # Left to the collector, it would keep the last message for long.
            await incoming.aclose()

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
    return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)


def _light(error: grpc.aio.AbortError) -> grpc.aio.AbortError:
    """The same exception without the frames that it came through: gRPC keeps it for a while, and they the message."""
    error.__context__ = None
    return error.with_traceback(None)
