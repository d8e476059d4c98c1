"""Certificates and signatures of other sites: of the run's authority, of the right name, for the right statement."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from fedhds.errors import PeerNotVerified
from fedhds.secure.signatures import Authority, Signer, check_signature, public_key_of_certificate
from fedhds.security.credentials import TlsFiles
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    init_authority(folder)
    issue(folder, "a", role=Role.SITE)
    return folder


def signer(folder: Path, name: str = "a") -> Signer:
    return Signer(TlsFiles(folder / "ca.crt", folder / f"{name}.crt", folder / f"{name}.key"))


def test_a_site_of_the_authority_is_known_and_so_are_its_shards(folder: Path) -> None:
    authority, own = Authority(folder / "ca.crt"), signer(folder)
    for site in ("a", "a/1"):
        key = authority.public_key_of(own.certificates, site)
        check_signature(key, own.sign(b"said"), b"said", site)
        with pytest.raises(PeerNotVerified, match=f"{site} did not sign"):
            check_signature(key, own.sign(b"said"), b"other", site)
    assert key == public_key_of_certificate(own.certificates[0])


def test_an_rsa_key_signs_too(folder: Path, tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    path = tmp_path / "rsa.key"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "rsa.crt").write_bytes(leaf_of(folder, "a", key.public_key()))
    own = signer(tmp_path, "rsa")
    public = Authority(folder / "ca.crt").public_key_of(own.certificates, "a")
    check_signature(public, own.sign(b"said"), b"said", "a")
    with pytest.raises(PeerNotVerified):
        check_signature(public, signer(folder).sign(b"said"), b"said", "a")


def test_other_certificates_are_refused(folder: Path, tmp_path: Path) -> None:
    authority = Authority(folder / "ca.crt")
    for role, name in ((Role.COORDINATOR, "coordinator"), (Role.OPERATOR, "operator")):
        issue(folder, name, role=role)
        with pytest.raises(PeerNotVerified, match=f"is for the {role}"):
            authority.public_key_of(signer(folder, name).certificates, name)
    with pytest.raises(PeerNotVerified, match="is for the site a"):
        authority.public_key_of(signer(folder).certificates, "b")
    init_authority(tmp_path)
    issue(tmp_path, "a", role=Role.SITE)
    with pytest.raises(PeerNotVerified, match="not valid under the authority"):
        authority.public_key_of(signer(tmp_path).certificates, "a")
    with pytest.raises(PeerNotVerified, match="0 certificates"):
        authority.public_key_of([], "a")
    with pytest.raises(PeerNotVerified, match="not valid"):
        authority.public_key_of([b"none"], "a")
    expired = leaf_of(folder, "a", ec.generate_private_key(ec.SECP256R1()).public_key(), ago=timedelta(days=3))
    with pytest.raises(PeerNotVerified, match="not valid"):
        authority.public_key_of([x509.load_pem_x509_certificate(expired).public_bytes(Encoding.DER)], "a")


def test_a_site_cannot_vouch_for_another_one(folder: Path) -> None:
    """Its own certificate's key signs a certificate under another name."""
    forged = leaf_of(folder, "b", ec.generate_private_key(ec.SECP256R1()).public_key(), issuer="a")
    chain = [x509.load_pem_x509_certificate(forged).public_bytes(Encoding.DER), *signer(folder).certificates]
    with pytest.raises(PeerNotVerified, match="not valid under the authority"):
        Authority(folder / "ca.crt").public_key_of(chain, "b")


def leaf_of(
    folder: Path,
    name: str,
    key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    *,
    issuer: str = "ca",
    ago: timedelta = timedelta(0),
) -> bytes:
    """A site's certificate in PEM as fedhds issues it, but for a key and by an issuer of the test's own."""
    template = x509.load_pem_x509_certificate((folder / "a.crt").read_bytes())
    above = x509.load_pem_x509_certificate((folder / f"{issuer}.crt").read_bytes())
    signing = load_pem_private_key((folder / f"{issuer}.key").read_bytes(), password=None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(above.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1) - ago)
        .not_valid_after(now + timedelta(days=1) - ago)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:fedhds:site:{name}")])
    for kind in (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage):
        extension = template.extensions.get_extension_for_class(kind)
        builder = builder.add_extension(extension.value, extension.critical)
    identifier = above.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issued_by = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    builder = builder.add_extension(issued_by, critical=False).add_extension(names, critical=False)
    return builder.sign(signing, SHA256()).public_bytes(Encoding.PEM)
