"""Renewed certificates and keys are used without a restart, by the coordinator and by the sites."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from fedhds.errors import SettingsError
from fedhds.security.credentials import TlsFiles, channel_credentials, server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.security.renewal import Renewal
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.rpc_client import CoordinatorClient
from tests.support.tls_servers import call, serving


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


def replaced(files: TlsFiles, new: TlsFiles, *, only: tuple[str, ...] = ("ca", "key", "cert")) -> None:
    for part in only:
        shutil.copyfile(getattr(new, part), getattr(files, part))


async def shown_by(target: str) -> int:
    """The serial number of the certificate that a server shows on a new connection."""
    host, port = target.split(":")
    return x509.load_pem_x509_certificate(
        (await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)), timeout=20)).encode()
    ).serial_number


def serial(files: TlsFiles) -> int:
    return x509.load_pem_x509_certificate(files.cert.read_bytes()).serial_number


def test_files_are_read_again_only_when_they_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("1")
    second.write_text("1")
    renewal = Renewal([first, second])
    assert renewal.load(lambda: "new") is None
    second.write_text("22")
    assert renewal.load(lambda: "new") == "new"
    assert renewal.load(lambda: "new") is None
    first.unlink()

    def refuse() -> str:
        raise SettingsError("--tls-key", "it does not belong to the certificate")

    assert renewal.load(refuse) is None
    assert renewal.load(refuse) is None
    assert caplog.text.count("does not belong to the certificate. Those before stay in use") == 1
    first.write_text("333")
    assert renewal.load(lambda: "newer") == "newer"


async def test_the_coordinator_shows_its_renewed_certificate_and_key(
    authority: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    files = issue(authority, "coordinator", role=Role.COORDINATOR, out=tmp_path / "in-use")
    new = issue(authority, "coordinator", role=Role.COORDINATOR, out=tmp_path / "new")
    site = issue(authority, "a", role=Role.SITE)
    async with serving(server_credentials(files)) as server:
        before = serial(files)
        assert await shown_by(server.target) == before
        async with grpc.aio.secure_channel(server.target, channel_credentials(site)) as old:
            await old.unary_unary("/test.Test/WhoAmI")(b"me", timeout=20)
            # The half of a pair is not used, and does no harm.
            replaced(files, new, only=("key",))
            assert await shown_by(server.target) == before
            assert "does not belong to the certificate" in caplog.text
            replaced(files, new, only=("cert",))
            assert await shown_by(server.target) == serial(new) != before
            # Connections that are there go on.
            await old.unary_unary("/test.Test/WhoAmI")(b"me", timeout=20)
        assert await call(server.target, channel_credentials(site)) == b"me"


async def test_the_coordinator_keeps_its_certificate_when_another_roles_is_put_there(
    authority: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = issue(authority, "coordinator", role=Role.COORDINATOR, out=tmp_path / "in-use")
    async with serving(server_credentials(files)) as server:
        before = serial(files)
        replaced(files, issue(authority, "a", role=Role.SITE))
        assert await shown_by(server.target) == before
        assert "a coordinator needs one issued with --role coordinator" in caplog.text


async def test_a_site_reconnects_with_its_renewed_certificate(authority: Path, tmp_path: Path) -> None:
    """The first coordinator's end breaks the connection; the one after it trusts a new authority alone."""
    site = issue(authority, "a", role=Role.SITE, out=tmp_path / "in-use")
    later = init_authority(tmp_path / "later").parent
    new = issue(later, "a", role=Role.SITE, out=tmp_path / "new")
    seen: list[bytes] = []

    def server(folder: Path, port: int) -> tuple[grpc.aio.Server, int]:
        own = grpc.aio.server(options=[("grpc.so_reuseport", 0)])

        async def enroll(request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollResponse:
            seen.append(context.auth_context()["x509_pem_cert"][0])
            return pb.EnrollResponse()

        handler = grpc.unary_unary_rpc_method_handler(
            enroll, pb.EnrollRequest.FromString, pb.EnrollResponse.SerializeToString
        )
        name = pb.DESCRIPTOR.services_by_name["Federation"].full_name
        own.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Enroll": handler}),))
        files = issue(folder, "coordinator", role=Role.COORDINATOR)
        return own, own.add_secure_port(f"127.0.0.1:{port}", server_credentials(files))

    first, port = server(authority, 0)
    await first.start()
    client = CoordinatorClient(f"127.0.0.1:{port}", site, reconnect_timeout_s=60)
    try:
        await client.call(client.federation.Enroll, pb.EnrollRequest())
        await first.stop(None)
        second, _ = server(later, port)
        await second.start()
        try:
            calling = asyncio.create_task(client.call(client.federation.Enroll, pb.EnrollRequest()))
            # The old certificate is refused; then the new ones arrive.
            await asyncio.sleep(0)
            replaced(site, new)
            await calling
        finally:
            await second.stop(None)
    finally:
        await client.close()
    assert x509.load_pem_x509_certificate(seen[0]).serial_number != serial(new)
    assert x509.load_pem_x509_certificate(seen[1]).serial_number == serial(new)
