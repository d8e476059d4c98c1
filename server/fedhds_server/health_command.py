"""`fedhds health`: asks the coordinator on this machine by gRPC health, for the probes of containers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import grpc

    from fedhds.security.credentials import TlsFiles

_ANSWER_S = 5.0
# No proxy leads to this machine, whatever the environment has for other programs.
_OPTIONS = (("grpc.enable_http_proxy", 0),)
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def health(
    listen: Annotated[
        str, typer.Option(envvar="FEDHDS_LISTEN", metavar="HOST:PORT", help="The coordinator's --listen.")
    ] = "127.0.0.1:8470",
    tls_ca: Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_CA", help="The coordinator's --tls-ca.")] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="FEDHDS_TLS_CERT", help="The coordinator's --tls-cert.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_KEY", help="The coordinator's --tls-key.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask only whether it lives; a standby lives, though it is not ready.")
    ] = False,
) -> None:
    """Ask the coordinator on this machine whether it is ready: exit status 0 if so, 1 if not.

    It shows the coordinator's own certificate, so that a probe needs no other secret.
    """
    # gRPC's own log would put a line of its internals before ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from fedhds.errors import CoordinatorUnreachable, SettingsError
    from fedhds.security.credentials import TlsFiles
    from fedhds.settings import host_and_port

    try:
        host, port = host_and_port(listen)
    except ValueError as error:
        raise SettingsError("--listen", str(error)) from None
    address = f"{_WILDCARDS.get(host, host)}:{port}"
    files = TlsFiles.from_settings(tls_ca, tls_cert, tls_key)
    request = health_pb2.HealthCheckRequest(service="grpc.health.v1.Health" if live else "")
    with _channel(address, files) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_ANSWER_S)
        except grpc.RpcError as error:
            raise CoordinatorUnreachable(f"no answer from {address}: {error.details() or error.code().name}") from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise typer.Exit(1)


def _channel(address: str, files: TlsFiles | None) -> grpc.Channel:
    import grpc

    if not files:
        return grpc.insecure_channel(address, _OPTIONS)
    from fedhds.security.credentials import probe_credentials
    from fedhds.security.pki import hosts_of

    # The certificate is for the name that sites use, and the probe dials this machine's own address.
    return grpc.secure_channel(
        address, probe_credentials(files), (*_OPTIONS, ("grpc.ssl_target_name_override", hosts_of(files.cert)[0]))
    )
