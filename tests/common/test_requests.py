"""Requests: the key stays where it was made, and the authority signs what its operator means, nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from fedhds.errors import UsageError
from fedhds.security.credentials import TlsFiles
from fedhds.security.identity import Role, identity_from_certificate
from fedhds.security.pki import hosts_of, init_authority
from fedhds.security.requests import make_request, sign_request


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


@pytest.fixture
def at_site(tmp_path: Path) -> Path:
    return tmp_path / "site"


def test_a_key_never_leaves_the_site(authority: Path, at_site: Path, tmp_path: Path) -> None:
    request, key = make_request(at_site, "hospital-a", role=Role.SITE)
    assert key.stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in request.read_bytes()
    answer = tmp_path / "answer"
    certificate = sign_request(authority, request, "hospital-a", role=Role.SITE, out=answer)
    assert {file.name for file in answer.iterdir()} == {"hospital-a.crt", "ca.crt"}
    identity = identity_from_certificate(certificate.read_bytes())
    assert (identity.name, identity.role) == ("hospital-a", Role.SITE)
    TlsFiles(answer / "ca.crt", certificate, key).check()
    assert not list(authority.glob("hospital-a*"))


def test_a_renewal_keeps_the_key(authority: Path, at_site: Path) -> None:
    request, key = make_request(at_site, "a", role=Role.SITE)
    first = sign_request(authority, request, "a", role=Role.SITE).read_bytes()
    again, same = make_request(at_site, "a", role=Role.SITE)
    assert same.read_bytes() == key.read_bytes()
    with pytest.raises(UsageError, match="add --renew"):
        sign_request(authority, again, "a", role=Role.SITE)
    second = sign_request(authority, again, "a", role=Role.SITE, renew=True).read_bytes()
    assert first != second
    assert identity_from_certificate(first) == identity_from_certificate(second)
    other, _ = make_request(at_site / "other", "a", role=Role.SITE)
    with pytest.raises(UsageError, match="is for another key"):
        sign_request(authority, other, "a", role=Role.SITE, renew=True)


def test_hosts_are_those_that_the_operator_names(authority: Path, at_site: Path) -> None:
    request, _ = make_request(at_site, "c", role=Role.COORDINATOR, hosts=["hub.example", "10.0.0.1"])
    with pytest.raises(UsageError, match=r"asks for the host 10\.0\.0\.1"):
        sign_request(authority, request, "c", role=Role.COORDINATOR, hosts=["hub.example"])
    bare, _ = make_request(at_site, "d", role=Role.COORDINATOR)
    with pytest.raises(UsageError, match="--host is missing"):
        sign_request(authority, bare, "d", role=Role.COORDINATOR)
    hosts = ["hub.example", "10.0.0.1"]
    assert hosts_of(sign_request(authority, request, "c", role=Role.COORDINATOR, hosts=hosts)) == hosts


@pytest.mark.parametrize(("name", "role"), [("hospital-b", Role.SITE), ("hospital-a", Role.OPERATOR)])
def test_a_request_of_somebody_else_is_refused(authority: Path, at_site: Path, name: str, role: Role) -> None:
    request, _ = make_request(at_site, "hospital-a", role=Role.SITE)
    with pytest.raises(UsageError, match="is a request of 'site:hospital-a'"):
        sign_request(authority, request, name, role=role)
    assert not list(authority.glob("hospital-*"))


def other_request(path: Path, key: object, name: str = "a") -> Path:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = builder.sign(key, algorithm)  # type: ignore[arg-type]
    path.write_bytes(request.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_request_of_openssl_needs_no_more_than_its_name(authority: Path, tmp_path: Path) -> None:
    request = other_request(tmp_path / "a.csr", ec.generate_private_key(ec.SECP384R1()))
    certificate = sign_request(authority, request, "a", role=Role.SITE)
    assert identity_from_certificate(certificate.read_bytes()).urn == "urn:fedhds:site:a"
    with pytest.raises(UsageError, match="is a request of 'a', not of the site b"):
        sign_request(authority, request, "b", role=Role.SITE)


def test_a_changed_request_is_refused(authority: Path, at_site: Path, tmp_path: Path) -> None:
    request, _ = make_request(at_site, "a", role=Role.SITE)
    der = bytearray(x509.load_pem_x509_csr(request.read_bytes()).public_bytes(serialization.Encoding.DER))
    at = der.index(b"urn:fedhds:site:a")
    der[at : at + 17] = b"urn:fedhds:site:b"
    request.write_bytes(x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM))
    with pytest.raises(UsageError, match="is not signed by its own key"):
        sign_request(authority, request, "a", role=Role.SITE)


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP521R1()), ed25519.Ed25519PrivateKey.generate()])
def test_a_key_that_grpc_does_not_take_is_refused(authority: Path, tmp_path: Path, key: object) -> None:
    with pytest.raises(UsageError, match="a key that gRPC does not take"):
        sign_request(authority, other_request(tmp_path / "a.csr", key), "a", role=Role.SITE)


def test_what_is_no_request_is_named(authority: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no certificate signing request"):
        sign_request(authority, authority / "ca.crt", "a", role=Role.SITE)
    with pytest.raises(UsageError, match="does not exist"):
        sign_request(authority, tmp_path / "none", "a", role=Role.SITE)
    with pytest.raises(UsageError, match="nobody dials a site"):
        make_request(tmp_path, "a", role=Role.SITE, hosts=["h"])
