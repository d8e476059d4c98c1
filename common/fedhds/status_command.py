"""`fedhds status`: what a run is doing, asked of its coordinator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedhds.v1 import federation_pb2 as pb


def status(
    server: Annotated[str, typer.Option(help="The coordinator's HOST:PORT.")] = "localhost:8470",
    tls_ca: Annotated[Path | None, typer.Option(help="CA certificate.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate of a site or an operator.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a run: phase, rounds, sites, evaluations."""
    from google.protobuf import json_format

    from fedhds.security.credentials import TlsFiles

    answer = ask(server, TlsFiles.from_settings(tls_ca, tls_cert, tls_key))
    if json:
        typer.echo(
            json_format.MessageToJson(
                answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
            )
        )
    else:
        _show(answer)


def ask(server: str, tls: object) -> pb.GetStatusResponse:
    """One status of the coordinator at `server`; raises CoordinatorUnreachable with the reason."""
    # gRPC's own log would put a line of its internals before ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from fedhds.errors import CoordinatorUnreachable
    from fedhds.security.credentials import TlsFiles, channel_credentials, diagnose_handshake
    from fedhds.v1 import federation_pb2 as pb
    from fedhds.v1 import federation_pb2_grpc as rpc

    files = tls if isinstance(tls, TlsFiles) else None
    channel = grpc.secure_channel(server, channel_credentials(files)) if files else grpc.insecure_channel(server)
    with channel:
        try:
            response: pb.GetStatusResponse = rpc.OperationsStub(channel).GetStatus(pb.GetStatusRequest(), timeout=10)
        except grpc.RpcError as error:
            reason = diagnose_handshake(server, files, 3.0) or error.details() or "no answer"
            raise CoordinatorUnreachable(f"cannot ask {server}: {reason}") from None
    return response


def _show(answer: pb.GetStatusResponse) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    spec = answer.run
    console.print(
        f"run {answer.run_id}: [bold]{answer.phase}[/], round {answer.round} of {spec.rounds}, "
        f"strategy {spec.strategy}, {answer.running_s:.0f} s"
    )
    if answer.message:
        console.print(answer.message, markup=False)
    sites = Table("site", "state", "rows", "evaluates", "task", "MB sent", "last error")
    for site in answer.sites:
        sites.add_row(
            site.site,
            site.state,
            str(site.rows),
            "yes" if site.evaluates else "",
            site.task,
            f"{site.bytes_received / 1e6:.2f}",
            site.last_error,
        )
    console.print(sites)
    if answer.evaluations:
        measured = Table("round", "held-out rows", "loss", "Rouge-L")
        for line in answer.evaluations:
            measured.add_row(str(line.round), str(line.rows), f"{line.loss:.4f}", f"{line.rouge_l:.4f}")
        console.print(measured)
    if answer.checkpoint:
        console.print(f"checkpoint: {answer.checkpoint}", markup=False)
