"""How an operator's commands reach the coordinator: the options that name it, and one call to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from google.protobuf.message import Message

_ANSWER_S = 10.0
# A status names every site and every contribution.
LARGE_ANSWERS = (("grpc.max_receive_message_length", -1),)

Server = Annotated[
    str,
    typer.Option(envvar="FEDHDS_SERVER", help="The coordinator's HOST:PORT; with standbys, all of them with commas."),
]
TlsCa = Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_CA", help="CA certificate.")]
TlsCert = Annotated[
    Path | None,
    typer.Option(envvar="FEDHDS_TLS_CERT", help="Certificate of an operator; a site's shows that site alone."),
]
TlsKey = Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_KEY", help="Key of that certificate.")]
DEFAULT_SERVER = "localhost:8470"


def targets(server: str) -> list[str]:
    """Every HOST:PORT of a `--server`; raises SettingsError for one that is malformed."""
    from fedhds.errors import SettingsError
    from fedhds.settings import addresses

    try:
        return addresses(server)
    except ValueError as error:
        raise SettingsError("--server", str(error)) from None


def call(method: str, request: Message, server: str, ca: Path | None, cert: Path | None, key: Path | None) -> Any:
    """The answer of whichever address of `server` leads to one call of the Operations service.

    Raises the coordinator's own error, or CoordinatorUnreachable with what is wrong with every address.
    """
    # gRPC's own log would put a line of its internals before ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from fedhds.errors import CoordinatorUnreachable, NotLeading
    from fedhds.grpc_errors import error_of, older_coordinator
    from fedhds.security.credentials import TlsFiles, channel_credentials, diagnose_failure
    from fedhds.v2 import status_pb2_grpc as status_rpc

    files = TlsFiles.from_settings(ca, cert, key)
    reasons = []
    for target in targets(server):
        if files:
            channel = grpc.secure_channel(target, channel_credentials(files), options=LARGE_ANSWERS)
        else:
            channel = grpc.insecure_channel(target, options=LARGE_ANSWERS)
        with channel:
            try:
                return getattr(status_rpc.OperationsStub(channel), method)(request, timeout=_ANSWER_S)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    raise older_coordinator(target) from None
                known = error_of(error)
                if known and not isinstance(known, NotLeading):
                    raise known from None
                details = error.details() or "no answer"
                reason = str(known or "") or diagnose_failure(target, files, details, 3.0) or details
                reasons.append(f"cannot ask {target}: {reason}")
    raise CoordinatorUnreachable("; ".join(reasons))
