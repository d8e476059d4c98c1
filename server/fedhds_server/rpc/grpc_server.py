"""The gRPC server as every coordinator has it: its limits, and requests that are no messages answered as such."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from fedhds.errors import RequestError
from fedhds.grpc_errors import abort

# Reports and manifests are single messages; adapters are streamed and have no such wall.
MAX_MESSAGE = 32 << 20
# A host that vanished leaves its connection behind, which TCP alone gives up after hours.
_IDLE_S, _PING_ANSWER_S = 30, 10
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
    # Without it gRPC waits a minute where TCP still answers, as behind a relay.
    ("grpc.http2.ping_timeout_ms", 1000 * _PING_ANSWER_S),
)


def new_server() -> grpc.aio.Server:
    """A server without services and ports."""
    return grpc.aio.server(options=_OPTIONS, interceptors=(_Decoding(),))


class _Decoding(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Decodes requests in the place of grpcio, which answers bytes that are no message with UNKNOWN and the library's
    exception, and a call that ends without any message never.
    """

    def __init__(self) -> None:
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
            self._handlers[name] = _decoding(handler)
        return self._handlers[name]


def _decoding(handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
    """The same method, reading its requests as a stream of bytes."""
    decode = handler.request_deserializer

    async def argument(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        messages = _decoded(requests, decode, context)
        return messages if handler.request_streaming else await _only(messages, context)

    async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        method = handler.stream_stream or handler.unary_stream
        responses = method(await argument(requests, context), context)
        if inspect.isawaitable(responses):
            await responses
            return
        async for response in responses:
            try:
                await context.write(response)
            except grpc.aio.InternalError:
                # The connection is gone: grpcio would log that as our exception, with a traceback.
                raise asyncio.CancelledError from None

    async def unary(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> Any:
        method = handler.stream_unary or handler.unary_unary
        return await method(await argument(requests, context), context)

    if handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream, None, handler.response_serializer)
    return grpc.stream_unary_rpc_method_handler(unary, None, handler.response_serializer)


async def _decoded(
    requests: AsyncIterator[bytes], decode: Callable[[bytes], Any], context: grpc.aio.ServicerContext
) -> AsyncIterator[Any]:
    async for raw in requests:
        try:
            message = decode(raw)
        except DecodeError:
            await abort(context, RequestError("the bytes of a request are no message of this method"))
        yield message


async def _only(messages: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
    async for message in messages:
        return message
    return await abort(context, RequestError("the call ended before its request had come"))
