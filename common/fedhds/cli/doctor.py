"""`fedhds doctor`: looks over the host of a coordinator or of a site, and says what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedhds.cli.checks import Finding

_COLORS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "bright_black"}


def doctor(
    server: Annotated[
        str, typer.Option(envvar="FEDHDS_SERVER", help="The coordinator's HOST:PORT; with standbys, all by commas.")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(
            envvar=["FEDHDS_RUN_FOLDER", "FEDHDS_STATE"], help="The coordinator's --run-folder or the site's --state."
        ),
    ] = None,
    tls_ca: Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_CA", help="The program's --tls-ca.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_CERT", help="The program's --tls-cert.")] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="FEDHDS_TLS_KEY", help="The program's --tls-key.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check this host: versions, GPU, disk, certificates, coordinator, clock.

    Exit status 0 if nothing failed, 1 if something did, 2 for a malformed option.
    """
    import json as codec

    findings = []
    for finding in _findings(server, folder, tls_ca, tls_cert, tls_key):
        findings.append(finding)
        if not json:
            state = typer.style(f"{finding.state:<8}", fg=_COLORS[finding.state])
            typer.echo(f"{state} {finding.check}: {finding.message}")
    well = all(finding.state != "failed" for finding in findings)
    if json:
        typer.echo(codec.dumps({"ok": well, "checks": [vars(finding) for finding in findings]}))
    if not well:
        raise typer.Exit(1)


def _findings(
    server: str, folder: Path | None, ca: Path | None, cert: Path | None, key: Path | None
) -> Iterator[Finding]:
    from fedhds.cli import checks
    from fedhds.cli.checks import Finding, State
    from fedhds.cli.connection import targets

    coordinators = targets(server) if server else []
    yield from checks.versions()
    yield checks.gpu()
    yield checks.disk(folder) if folder else Finding("disk", State.SKIPPED, "not looked at; give --folder")
    finding, files = checks.certificates(ca, cert, key)
    yield finding
    if not server:
        yield Finding("server", State.SKIPPED, "not looked for; give --server")
    elif finding.state is State.FAILED:
        yield Finding("server", State.SKIPPED, "not asked with certificates that cannot serve")
        coordinators = []
    if "FEDHDS_CONFIG" in os.environ:
        yield Finding("config", State.WARNING, "the file of FEDHDS_CONFIG is not read; give what it holds as flags")
    clock_known = False
    standing_by = []
    for target in coordinators:
        for finding in checks.coordinator(target, files):
            yield finding
            clock_known |= finding.check == "clock"
            standing_by.append(finding.message == checks.STANDS_BY)
    if standing_by and all(standing_by):
        yield Finding("server", State.WARNING, "none of them leads; give all addresses, or start another coordinator")
    if not clock_known:
        yield Finding("clock", State.SKIPPED, "no coordinator that leads told its time")
