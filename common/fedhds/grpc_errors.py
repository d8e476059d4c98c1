"""The one table between domain errors and gRPC statuses, for both directions; internals never leak."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from fedhds import PROTOCOL_VERSIONS, __version__, errors
from fedhds.encoding import printable

logger = logging.getLogger(__name__)

# Most specific first: the first match decides. The class's own name travels in the trailing metadata, so that the other
# side raises the same class, with the same code; the status code is what proxies and foreign clients see.
_TABLE: tuple[tuple[type[errors.FedhdsError], grpc.StatusCode], ...] = (
    (errors.NameInUse, grpc.StatusCode.ALREADY_EXISTS),
    (errors.Evicted, grpc.StatusCode.PERMISSION_DENIED),
    (errors.EnrollmentRefused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotPermitted, grpc.StatusCode.PERMISSION_DENIED),
    (errors.RunOver, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.SessionLost, grpc.StatusCode.UNAUTHENTICATED),
    (errors.TaskError, grpc.StatusCode.NOT_FOUND),
    (errors.ArtifactError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.RequestError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.PrivacyError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.PolicyError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.SecureAggregationError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.StorageError, grpc.StatusCode.UNAVAILABLE),
    (errors.NotLeading, grpc.StatusCode.UNAVAILABLE),
)
_REASON = "fedhds-error"
# Some of ours name files and settings.
_MAX_MESSAGE = 2000
_CLASSES = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.FedhdsError)
}


def error_of(call: grpc.RpcError) -> errors.FedhdsError | None:
    """The domain error that the other side raised, or None when the call failed for another reason."""
    metadata = call.trailing_metadata() or ()
    name = next((str(value) for key, value in metadata if key == _REASON), None)
    kind = _CLASSES.get(name or "")
    if kind is None:
        return None
    # Built without __init__: some classes take facts that do not travel, only the message does.
    error = kind.__new__(kind)
    Exception.__init__(error, printable(call.details() or "", limit=_MAX_MESSAGE))
    return error


def older_coordinator(target: str) -> errors.EnrollmentRefused:
    """What a call means that the coordinator at `target` does not know: it is of a version before protocol 2."""
    return errors.EnrollmentRefused(
        f"the coordinator at {target} does not know protocol {max(PROTOCOL_VERSIONS)} of fedhds {__version__}; install "
        f"fedhds {__version__} there, or here the version that runs there (fedhds 0.1 or 0.2)"
    )


async def abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """Ends a call with the status that `error` stands for; raises always."""
    for kind, code in _TABLE:
        if isinstance(error, kind):
            if isinstance(error, errors.StorageError):
                # The caller tries again; who can fix the disk reads this side's log.
                logger.error("%s", error)
            await context.abort(code, str(error), ((_REASON, type(error).__name__),))
    logger.error("internal error in a call from %s", context.peer(), exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, "internal error; the coordinator's log has the details")


def answers(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Decorates a unary servicer method: what it raises becomes a status."""

    async def wrapped(self: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await method(self, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the last resort of a server: it is logged and answered as INTERNAL
            return await abort(context, error)

    wrapped.__doc__ = method.__doc__
    return wrapped
