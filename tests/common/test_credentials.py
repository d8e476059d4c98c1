"""Checking the TLS flags, and handshakes with real servers: who is let in and who is not."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedhds.cli import checks
from fedhds.cli.checks import State
from fedhds.errors import EnrollmentRefused, SettingsError, UsageError
from fedhds.security import pki
from fedhds.security.credentials import TlsFiles, channel_credentials, own_identity, server_credentials
from fedhds.security.identity import Role, identity_from_certificate
from fedhds.security.pki import init_authority, issue
from tests.support.tls_servers import DAY, call, is_refused, issue_dated, lax_client, lax_server, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


@pytest.fixture
def site(folder: Path) -> TlsFiles:
    return issue(folder, "hospital-a", role=Role.SITE)


@pytest.fixture
def coordinator(folder: Path) -> TlsFiles:
    return issue(folder, "coordinator", role=Role.COORDINATOR)


@pytest.fixture
def stranger(tmp_path: Path) -> TlsFiles:
    """A site of another federation, whose authority has the same name."""
    return issue(init_authority(tmp_path / "elsewhere").parent, "hospital-a", role=Role.SITE)


def test_no_flags_mean_no_tls() -> None:
    assert TlsFiles.from_settings(None, None, None) is None


def test_good_files_pass(site: TlsFiles) -> None:
    assert TlsFiles.from_settings(site.ca, site.cert, site.key) == site
    assert own_identity(site).urn == "urn:fedhds:site:hospital-a"


@pytest.mark.parametrize("missing", ["ca", "cert", "key"])
def test_an_incomplete_set_of_flags_names_the_missing_one(site: TlsFiles, missing: str) -> None:
    given = {"ca": site.ca, "cert": site.cert, "key": site.key, missing: None}
    with pytest.raises(SettingsError, match="go together") as caught:
        TlsFiles.from_settings(given["ca"], given["cert"], given["key"])
    assert caught.value.setting == f"--tls-{missing}"


@pytest.mark.parametrize("flag", ["ca", "cert", "key"])
@pytest.mark.parametrize("broken", ["missing", "a folder", "empty", "another kind"])
def test_an_unusable_file_is_named_with_its_flag(site: TlsFiles, tmp_path: Path, flag: str, broken: str) -> None:
    path = tmp_path / "broken.pem"
    if broken == "a folder":
        path.mkdir()
    elif broken == "empty":
        path.touch()
    elif broken == "another kind":
        path.write_bytes((site.cert if flag == "key" else site.key).read_bytes())
    files = replace(site, **{flag: path})
    with pytest.raises(SettingsError, match=r"broken\.pem (cannot be read|holds no|is not an)") as caught:
        files.check()
    assert caught.value.setting == f"--tls-{flag}"


def test_a_key_of_another_certificate_is_refused(site: TlsFiles, folder: Path) -> None:
    other = issue(folder, "hospital-b", role=Role.SITE)
    with pytest.raises(SettingsError, match=r"--tls-key.* does not belong to the certificate"):
        TlsFiles.from_settings(site.ca, site.cert, other.key)


def test_a_certificate_of_another_authority_is_refused(site: TlsFiles, stranger: TlsFiles) -> None:
    with pytest.raises(SettingsError, match=r"--tls-cert.* is not signed by the authority"):
        TlsFiles.from_settings(stranger.ca, site.cert, site.key)


# Of the curve secp112r1, which the cryptography package does not know; made by OpenSSL.
ODD_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBITCB7KADAgECAhQRXxWFf5SI17HM4A36cd13ImXLGTAKBggqhkjOPQQDAjAM
MQowCAYDVQQDDAF4MB4XDTI2MTEyNzA5NTYzMFoXDTI2MTEzMDA5NTYzMFowDDEK
MAgGA1UEAwwBeDAyMBAGByqGSM49AgEGBSuBBAAGAx4ABAvEw4o3Gwy7ZpDBOBzq
vRGnJ3bgkuI20uvZ82qjUzBRMB0GA1UdDgQWBBS8/5Ra65/L6Pd9k3BAFnF5o05e
RjAfBgNVHSMEGDAWgBS8/5Ra65/L6Pd9k3BAFnF5o05eRjAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCAyQAMCECDl6uHRx0CpbAl54bugnUAg8Aw9KE0DMsjthu
KHPHOYo=
-----END CERTIFICATE-----
"""
ODD_KEY = """\
-----BEGIN EC PRIVATE KEY-----
MD4CAQEEDibxjAXtd0bW4HiUvbRyoAcGBSuBBAAGoSADHgAEC8TDijcbDLtmkME4
HOq9EacnduCS4jbS69nzag==
-----END EC PRIVATE KEY-----
"""


@pytest.mark.parametrize("flag", ["ca", "cert", "key"])
def test_a_curve_that_nothing_here_knows_is_refused(site: TlsFiles, tmp_path: Path, flag: str) -> None:
    path = tmp_path / "odd.pem"
    path.write_text(ODD_KEY if flag == "key" else ODD_CERTIFICATE)
    with pytest.raises(SettingsError, match=rf"--tls-{flag}: .*odd\.pem .*is not supported") as caught:
        replace(site, **{flag: path}).check()
    assert caught.value.setting == f"--tls-{flag}"
    finding, _ = checks.certificates(*(path if name == flag else getattr(site, name) for name in ("ca", "cert", "key")))
    assert finding.state is State.FAILED
    with pytest.raises(EnrollmentRefused, match="is not supported"):
        identity_from_certificate(ODD_CERTIFICATE.encode())


def test_an_authority_of_such_a_curve_issues_nothing(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text(ODD_CERTIFICATE)
    (tmp_path / "ca.key").write_text(ODD_KEY)
    with pytest.raises(UsageError, match=r"ca\.crt .*is not supported"):
        issue(tmp_path, "a", role=Role.SITE)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (ec.generate_private_key(ec.SECP521R1()), "secp521r1"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (ec.generate_private_key(ec.SECP384R1()), ""),
        (rsa.generate_private_key(65537, 2048), ""),
    ],
)
async def test_a_key_that_grpc_does_not_take_is_refused_before_it_fails_there(
    folder: Path, site: TlsFiles, coordinator: TlsFiles, key: Any, name: str
) -> None:
    authority: Any = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    ca = x509.load_pem_x509_certificate(site.ca.read_bytes())
    leaf = x509.load_pem_x509_certificate(site.cert.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(ca.subject, leaf.subject, key.public_key(), 9, now - DAY, now + DAY)
    signed = builder.add_extension(names.value, critical=False).sign(authority, hashes.SHA256())
    site.cert.write_bytes(signed.public_bytes(Encoding.PEM))
    site.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    if name:
        with pytest.raises(SettingsError, match=f"--tls-cert.* has a key of the kind {name}, which gRPC does not take"):
            site.check()
    else:
        site.check()
    async with serving(server_credentials(coordinator)) as listener:
        credentials = channel_credentials(site)
        if name:
            await is_refused(listener.target, credentials)
        else:
            await call(listener.target, credentials)


@pytest.mark.parametrize(("starts", "ends", "reason"), [(-9, -1, "expired on"), (1, 9, "valid only from")])
def test_a_certificate_out_of_its_time_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, starts: int, ends: int, reason: str
) -> None:
    files = issue_dated(monkeypatch, folder, "hospital-a", Role.SITE, starts, ends)
    with pytest.raises(SettingsError, match=f"--tls-cert.*{reason}"):
        files.check()


def test_an_expired_authority_is_refused(site: TlsFiles, folder: Path) -> None:
    key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    ca = x509.load_pem_x509_certificate(site.ca.read_bytes())
    site.ca.write_bytes(_certify(ca, ca, key, ends=datetime.now(UTC) - DAY))
    with pytest.raises(
        SettingsError, match=r"--tls-ca.*expired on .*; make a new authority .* issue every certificate"
    ):
        site.check()


def test_of_an_authority_that_expired_with_its_certificates_the_authority_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a certificate lives no longer than its authority, this is how every authority expires."""
    with monkeypatch.context() as dated:
        now = datetime.now(UTC).replace(microsecond=0)
        dated.setattr(pki, "_validity", lambda days: (now - 9 * DAY, now - DAY))
        folder = init_authority(tmp_path / "old").parent
        dated.setattr(pki, "_load_authority", _unchecked)
        files = issue(folder, "hospital-a", role=Role.SITE)
    finding, _ = checks.certificates(files.ca, files.cert, files.key)
    assert re.search(r"--tls-ca: .*ca\.crt expired on .*; make a new authority", finding.message)
    assert "--renew" not in finding.message


def _unchecked(folder: Path) -> tuple[x509.Certificate, Any]:
    key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    return x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()), key


def test_a_certificate_without_a_fedhds_identity_is_refused(site: TlsFiles, folder: Path) -> None:
    key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    ca = x509.load_pem_x509_certificate(site.ca.read_bytes())
    leaf = x509.load_pem_x509_certificate(site.cert.read_bytes())
    site.cert.write_bytes(_certify(leaf, ca, key))
    with pytest.raises(SettingsError, match=r"--tls-cert.*carries no urn:fedhds"):
        site.check()
    with pytest.raises(EnrollmentRefused):
        own_identity(site)


def test_an_intermediate_authority_beside_the_leaf_leads_to_the_root(tmp_path: Path) -> None:
    root = init_authority(tmp_path / "root", name="root").parent
    middle = init_authority(tmp_path / "middle", name="middle").parent
    files = issue(middle, "hospital-a", role=Role.SITE)
    signed = _certify(
        x509.load_pem_x509_certificate((middle / "ca.crt").read_bytes()),
        x509.load_pem_x509_certificate((root / "ca.crt").read_bytes()),
        load_pem_private_key((root / "ca.key").read_bytes(), password=None),
    )
    under_root = replace(files, ca=root / "ca.crt")
    with pytest.raises(SettingsError, match="not signed by"):
        under_root.check()
    files.cert.write_bytes(files.cert.read_bytes() + signed)
    under_root.check()


def _certify(like: x509.Certificate, issuer: x509.Certificate, key: Any, ends: datetime | None = None) -> bytes:
    """A certificate with the subject and key of `like` and no extensions, signed by `issuer`; PEM."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer.subject, like.subject, like.public_key(), 7)
    builder = builder.not_valid_before(now - 9 * DAY).not_valid_after(ends or now + DAY)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_each_end_refuses_the_other_ends_certificate(site: TlsFiles, coordinator: TlsFiles) -> None:
    with pytest.raises(SettingsError, match="--role coordinator"):
        server_credentials(site)
    with pytest.raises(SettingsError, match="--role site"):
        channel_credentials(coordinator)


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR])
async def test_the_coordinator_sees_who_calls(folder: Path, coordinator: TlsFiles, role: Role) -> None:
    caller = issue(folder, "caller", role=role)
    async with serving(server_credentials(coordinator)) as server:
        assert await call(server.target, channel_credentials(caller)) == b"me"
        assert await call(server.target.replace("127.0.0.1", "localhost"), channel_credentials(caller)) == b"me"
    assert server.seen == [own_identity(caller)] * 2


async def test_without_tls_nobody_has_an_identity() -> None:
    async with serving(None) as server:
        await call(server.target, None)
    assert server.seen == [None]


async def test_a_client_without_a_certificate_is_refused(coordinator: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        await is_refused(server.target, grpc.ssl_channel_credentials(coordinator.ca.read_bytes()))
        await is_refused(server.target, None)
    assert server.seen == []


async def test_a_client_of_another_authority_is_refused(coordinator: TlsFiles, stranger: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        await is_refused(server.target, lax_client(stranger, trusts=coordinator))
    assert server.seen == []


async def test_a_client_does_not_talk_to_a_coordinator_of_another_authority(
    coordinator: TlsFiles, stranger: TlsFiles
) -> None:
    async with serving(lax_server(coordinator, trusts=stranger)) as server:
        await is_refused(server.target, channel_credentials(stranger))
    assert server.seen == []


async def test_an_expired_client_certificate_is_refused(
    folder: Path, coordinator: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = issue_dated(monkeypatch, folder, "late", Role.SITE, -9, -1)
    async with serving(server_credentials(coordinator)) as server:
        await is_refused(server.target, lax_client(expired))
    assert server.seen == []


async def test_a_key_that_does_not_match_opens_no_connection(
    folder: Path, site: TlsFiles, coordinator: TlsFiles
) -> None:
    thief = replace(site, key=issue(folder, "thief", role=Role.SITE).key)
    async with serving(server_credentials(coordinator)) as server:
        await is_refused(server.target, lax_client(thief))
    assert server.seen == []


async def test_a_site_cannot_pose_as_the_coordinator(folder: Path, site: TlsFiles) -> None:
    other = issue(folder, "hospital-b", role=Role.SITE)
    async with serving(lax_server(other)) as server:
        await is_refused(server.target, channel_credentials(site))
    assert server.seen == []


async def test_a_renewed_certificate_is_the_same_peer(folder: Path, site: TlsFiles, coordinator: TlsFiles) -> None:
    async with serving(server_credentials(coordinator)) as server:
        await call(server.target, channel_credentials(site))
        issue(folder, "hospital-a", role=Role.SITE, renew=True)
        await call(server.target, channel_credentials(site))
    assert server.seen[0] == server.seen[1]
