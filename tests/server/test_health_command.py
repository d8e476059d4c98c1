"""`fedhds health` against a coordinator that leads, stands by, or is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import grpc
import pytest
import typer
from grpc_health.v1 import health_pb2_grpc
from typer.testing import CliRunner, Result

from fedhds.errors import CoordinatorUnreachable, SettingsError
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds_server.coordinator import Coordinator
from fedhds_server.health_command import health
from fedhds_server.leadership.gate import LeaderGate


@asynccontextmanager
async def listening(gate: LeaderGate, files: TlsFiles | None) -> AsyncIterator[str]:
    """The port of a server that answers health as `gate` has it."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(gate.health, server)
    if files:
        port = server.add_secure_port("127.0.0.1:0", server_credentials(files))
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield str(port)
    finally:
        await server.stop(None)


async def asked(port: str, *flags: str, files: TlsFiles | None = None) -> Result:
    app = typer.Typer()
    app.command()(health)
    # As in a container: where the coordinator listens and its files are said by the environment alone.
    environment = {"FEDHDS_LISTEN": f"0.0.0.0:{port}"}
    if files:
        environment |= {
            "FEDHDS_TLS_CA": str(files.ca),
            "FEDHDS_TLS_CERT": str(files.cert),
            "FEDHDS_TLS_KEY": str(files.key),
        }
    return await asyncio.to_thread(CliRunner().invoke, app, list(flags), env=environment)


@pytest.mark.parametrize("tls", [False, True])
async def test_a_leader_is_ready_and_a_standby_only_lives(tmp_path: Path, tls: bool) -> None:
    files = None
    if tls:
        # Its certificate names the host that sites dial, not the one that the probe does.
        folder = init_authority(tmp_path / "certs").parent
        files = issue(folder, "coordinator", role=Role.COORDINATOR, hosts=["fed.example.org"])
    gate = LeaderGate()
    async with listening(gate, files) as port:
        await gate.stand_by()
        standing = await asked(port, files=files)
        assert (standing.exit_code, standing.output) == (1, "NOT_SERVING\n")
        assert (await asked(port, "--live", files=files)).exit_code == 0
        async with gate.of(cast(Coordinator, object())):
            leading = await asked(port, files=files)
            assert (leading.exit_code, leading.output) == (0, "SERVING\n")


async def test_nobody_there_is_said() -> None:
    answer = await asked("1")
    assert isinstance(answer.exception, CoordinatorUnreachable)
    assert "no answer from 127.0.0.1:1" in str(answer.exception)


async def test_a_coordinator_of_another_authority_is_not_taken_for_this_one(tmp_path: Path) -> None:
    own, other = (
        issue(init_authority(tmp_path / name).parent, "coordinator", role=Role.COORDINATOR) for name in ("a", "b")
    )
    async with listening(LeaderGate(), other) as port:
        answer = await asked(port, files=own)
    assert isinstance(answer.exception, CoordinatorUnreachable)


async def test_an_address_that_is_none_is_refused() -> None:
    answer = await asked("port")
    assert isinstance(answer.exception, SettingsError)
    answer = await asked("1", "--listen=::1:8470")
    assert isinstance(answer.exception, SettingsError)
    assert "brackets and a port: [::1]:8470" in str(answer.exception)


async def test_a_proxy_for_other_programs_does_not_keep_the_probe_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    gate = LeaderGate()
    async with listening(gate, None) as port:
        await gate.stand_by()
        assert (await asked(port, "--live")).output == "SERVING\n"
