"""Answers calls of fedhds 0.1 and 0.2, which speak protocol 1: they are told which version to install."""

from __future__ import annotations

from typing import Any

import grpc

from fedhds import PROTOCOL_VERSIONS, __version__

_SERVICES = ("fedhds.v1.Federation", "fedhds.v1.Operations")
# The class and the trailing metadata by which those versions know a refusal.
_METADATA = (("fedhds-error", "EnrolmentRefused"),)


class Protocol1Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Refuses every method of protocol 1."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The refusing method; None for calls of other services."""
        _, service, _ = handler_call_details.method.split("/", 2)
        # The bytes of such a request are of no interest.
        refuse = grpc.stream_stream_rpc_method_handler(_refuse, request_deserializer=bytes)
        return refuse if service in _SERVICES else None


async def _refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.FAILED_PRECONDITION,
        f"this coordinator runs fedhds {__version__} and speaks protocol {max(PROTOCOL_VERSIONS)}, this program "
        f"protocol 1; install fedhds {__version__} here",
        _METADATA,
    )
