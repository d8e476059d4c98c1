"""An operator's commands find their coordinator by the environment alone, as in a container."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from fedhds.cli.toolbox import app
from fedhds.security.credentials import server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.spec import RunSpec
from fedhds.v2 import status_pb2

SPEC = RunSpec.of(model="m", rounds=3).model_dump_json()
COMMANDS = {
    ("status",): ("GetStatus", status_pb2.GetStatusResponse(run_id="r1", spec=SPEC)),
    ("pause", "--reason=r"): ("Pause", status_pb2.PauseResponse()),
    ("resume",): ("Resume", status_pb2.ResumeResponse()),
    ("stop", "--reason=r"): ("Stop", status_pb2.StopResponse()),
    ("evict", "hospital-a", "--reason=r"): ("Evict", status_pb2.EvictResponse()),
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
async def test_server_and_tls_files_come_from_the_environment(tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = init_authority(tmp_path / "certs").parent
    coordinator = issue(folder, "coordinator", role=Role.COORDINATOR, hosts=["localhost"])
    operator = issue(folder, "alice", role=Role.OPERATOR)
    method, answer = COMMANDS[command]
    callers = []

    async def reply(_: bytes, context: grpc.aio.ServicerContext) -> bytes:
        callers.append(context.auth_context()["x509_common_name"])
        return answer.SerializeToString()

    service = status_pb2.DESCRIPTOR.services_by_name["Operations"].full_name
    handlers = grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(reply)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_secure_port("localhost:0", server_credentials(coordinator))
    await server.start()
    environment = {
        "FEDHDS_SERVER": f"localhost:{port}",
        "FEDHDS_TLS_CA": str(operator.ca),
        "FEDHDS_TLS_CERT": str(operator.cert),
        "FEDHDS_TLS_KEY": str(operator.key),
    }
    try:
        done = await asyncio.to_thread(CliRunner().invoke, app, list(command), env=environment)
    finally:
        await server.stop(None)
    assert done.exit_code == 0, done
    assert callers == [[b"alice"]]
