"""Reading a peer's identity: exactly one well-formed urn, or nothing."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedhds.errors import EnrollmentRefused
from fedhds.security.identity import PeerIdentity, Role, identity_from_certificate, identity_of
from fedhds.security.pki import init_authority, issue


def _pem(*names: x509.GeneralName) -> bytes:
    """A self-signed certificate with these subject alternative names: identity looks at nothing else."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize("role", list(Role))
def test_an_issued_certificate_gives_back_name_role_and_key(tmp_path: Path, role: Role) -> None:
    folder = init_authority(tmp_path).parent
    pem = issue(folder, "hospital-a", role=role).cert.read_bytes()
    identity = identity_from_certificate(pem)
    key = x509.load_pem_x509_certificate(pem).public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert identity == PeerIdentity("hospital-a", role, hashlib.sha256(der).hexdigest())
    assert identity.urn == f"urn:fedhds:{role.value}:hospital-a"


def test_identity_survives_a_renewal(tmp_path: Path) -> None:
    folder = init_authority(tmp_path).parent
    before = issue(folder, "hospital-a", role=Role.SITE).cert.read_bytes()
    after = issue(folder, "hospital-a", role=Role.SITE, renew=True).cert.read_bytes()
    assert before != after
    assert identity_from_certificate(before) == identity_from_certificate(after)


def test_a_same_named_certificate_of_another_key_is_another_identity(tmp_path: Path) -> None:
    folder = init_authority(tmp_path / "ca").parent
    one = issue(folder, "hospital-a", role=Role.SITE).cert.read_bytes()
    two = issue(folder, "hospital-a", role=Role.SITE, out=tmp_path / "b").cert.read_bytes()
    assert identity_from_certificate(one) != identity_from_certificate(two)


def test_foreign_names_beside_the_urn_do_not_matter() -> None:
    pem = _pem(x509.DNSName("a.example"), _uri("spiffe://x/y"), _uri("urn:fedhds:operator:ops"))
    identity = identity_from_certificate(pem)
    assert (identity.name, identity.role) == ("ops", Role.OPERATOR)


@pytest.mark.parametrize(
    "names",
    [
        [],
        [x509.DNSName("hospital-a")],
        [_uri("urn:other:site:a")],
        [_uri("urn:fedhds:site:a"), _uri("urn:fedhds:operator:a")],
        [_uri("urn:fedhds:site:a"), _uri("urn:fedhds:site:a")],
        [_uri("urn:fedhds:site:a"), _uri("URN:fedhds:operator:a")],
        [_uri("URN:FEDHDS:site:a")],
        [_uri("urn:fedhds:admin:a")],
        [_uri("urn:fedhds:SITE:a")],
        [_uri("urn:fedhds:site:")],
        [_uri("urn:fedhds:site")],
        [_uri("urn:fedhds:site:a/b")],
        [_uri("urn:fedhds:site:a:b")],
        [_uri("urn:fedhds:site:" + "a" * 65)],
    ],
    ids=str,
)
def test_anything_but_one_well_formed_urn_is_refused(names: list[x509.GeneralName]) -> None:
    with pytest.raises(EnrollmentRefused, match="issued"):
        identity_from_certificate(_pem(*names))


@pytest.mark.parametrize("pem", [b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(EnrollmentRefused, match="cannot be read"):
        identity_from_certificate(pem)


def test_no_tls_means_no_identity() -> None:
    assert identity_of({}) is None
    assert identity_of({"transport_security_type": [b"insecure"]}) is None


def test_tls_without_a_certificate_is_not_taken_for_no_tls() -> None:
    with pytest.raises(EnrollmentRefused, match="no certificate"):
        identity_of({"transport_security_type": [b"ssl"]})


def test_the_certificate_of_the_connection_is_the_identity() -> None:
    context = {"transport_security_type": [b"ssl"], "x509_pem_cert": [_pem(_uri("urn:fedhds:site:a"))]}
    identity = identity_of(context)
    assert identity is not None
    assert (identity.name, identity.role) == ("a", Role.SITE)
