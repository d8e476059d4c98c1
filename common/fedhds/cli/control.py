"""`fedhds pause`, `resume`, `stop`, `rollback`, `evict`, `confirm-model`: what an operator may do to a run, and why."""

from __future__ import annotations

from typing import Annotated

import typer

from fedhds.cli.connection import DEFAULT_SERVER, Server, TlsCa, TlsCert, TlsKey, call

Reason = Annotated[str, typer.Option(help="Why; it is kept in the run's journal.")]


def pause(
    reason: Reason,
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Hand out no new task; what sites work on may still come in."""
    from fedhds.v2 import status_pb2

    call("Pause", status_pb2.PauseRequest(reason=reason), server, tls_ca, tls_cert, tls_key)
    typer.echo("The run is paused; `fedhds resume` lets it go on.")


def resume(
    reason: Reason = "",
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Let a paused run go on."""
    from fedhds.v2 import status_pb2

    call("Resume", status_pb2.ResumeRequest(reason=reason), server, tls_ca, tls_cert, tls_key)
    typer.echo("The run goes on.")


def stop(
    reason: Reason,
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """End the run for good; every site gets the adapter as it is."""
    from fedhds.v2 import status_pb2

    call("Stop", status_pb2.StopRequest(reason=reason), server, tls_ca, tls_cert, tls_key)
    typer.echo("The run is stopped; its sites are given the last adapter.")


def rollback(
    reason: Reason,
    to_round: Annotated[
        int | None,
        typer.Option(min=0, help="Round whose adapter the run goes on from; by default the one before the newest."),
    ] = None,
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Take the global adapter back to an earlier round for good; the open round ends without a result."""
    from fedhds.v2 import status_pb2

    request = status_pb2.RollbackRequest(round_number=to_round, reason=reason)
    answer = call("Rollback", request, server, tls_ca, tls_cert, tls_key)
    typer.echo(f"The run goes on from the adapter of round {answer.round_number}.")


def evict(
    site: Annotated[
        str,
        typer.Argument(help="The site's name, as `fedhds status` shows it, or its key's fingerprint, also in advance."),
    ],
    reason: Reason,
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Exclude a site from the run for good, with all other sites of its certificate."""
    from fedhds.v2 import status_pb2

    call("Evict", status_pb2.EvictRequest(site=site, reason=reason), server, tls_ca, tls_cert, tls_key)
    typer.echo(f"{site} is evicted.")


def confirm_model(
    fingerprint: Annotated[str, typer.Argument(help="64 hexadecimal digits, from `fedhds fingerprint MODEL`.")],
    reason: Reason = "checked by the operator",
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
) -> None:
    """Say which base model is the run's; before it begins, sites with another one are refused."""
    from fedhds.v2 import status_pb2

    request = status_pb2.ConfirmModelRequest(fingerprint=fingerprint, reason=reason)
    call("ConfirmModel", request, server, tls_ca, tls_cert, tls_key)
    typer.echo("The base model is confirmed.")
