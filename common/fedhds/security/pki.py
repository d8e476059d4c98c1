"""A small certificate authority for one federation: it mints what `credentials` uses and `identity` reads.

Keys are ECDSA P-256, unencrypted PKCS #8 with mode 0600. Certificates follow RFC 5280 to the letter that
`openssl verify -x509_strict` reads. Key and certificate stand in separate files, `NAME.key` and `NAME.crt`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedhds.errors import EnrollmentRefused, StorageError, UsageError
from fedhds.runtime.files import make_folder, replace_file
from fedhds.security.credentials import TlsFiles
from fedhds.security.identity import URN_PREFIX, Role, check_name, identity_from_certificate

AUTHORITY = "ca"
"""Stem of the authority's two files; no leaf can have this name."""

BACKDATE = timedelta(hours=1)
"""How long before its issue a certificate begins: machines disagree about the time, and it must not lie ahead."""

_MAX_DAYS = 36_500
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*")
# A coordinator also asks itself for its health; its role lets it do nothing else with another's.
_PURPOSES = {
    Role.SITE: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.OPERATOR: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.COORDINATOR: (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
}


def init_authority(folder: Path, *, name: str = "fedhds federation", days: int = 3650) -> Path:
    """Mints `ca.crt` and `ca.key` in `folder` (made with mode 0700), valid for `days`; returns `ca.crt`.

    Raises UsageError if there is an authority already, or if the folder cannot be written.
    """
    certificate_path, key_path = paths(folder, AUTHORITY)
    for path in (certificate_path, key_path):
        if path.exists():
            raise UsageError(
                f"{path} exists already: issue certificates from it with `fedhds certs issue`, "
                "or choose another folder for a new authority"
            )
    if not 1 <= len(name) <= 64:
        raise UsageError(f"the authority's name {name!r} must have 1 to 64 characters")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    starts, ends = _validity(days)
    builder = _builder(subject, subject, key.public_key(), starts, ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    make_private_folder(folder)
    write_key(key_path, key)
    write(certificate_path, _certificate_pem(builder.sign(key, hashes.SHA256())))
    return certificate_path


def issue(
    folder: Path,
    name: str,
    *,
    role: Role,
    hosts: Sequence[str] = (),
    days: int = 825,
    out: Path | None = None,
    renew: bool = False,
) -> TlsFiles:
    """Mints `NAME.crt` and `NAME.key` in `out` (default `folder`), signed by the authority in `folder`.

    Valid for `days`, but no longer than the authority. `out` also gets a copy of `ca.crt`, so that it holds
    all that its user needs. `hosts` are the DNS names and IP addresses by which sites reach a coordinator
    (default: localhost, 127.0.0.1, ::1 and this machine's name). With `renew` the private key is kept, and
    so is the identity; a coordinator's renewed certificate names the old hosts and `hosts`.

    Raises UsageError if the name is not allowed or taken, if `hosts` are given for another role, if the
    authority is missing or expired, or if a file cannot be read or written.
    """
    check_leaf(name, role, hosts)
    # Before a key is made that nobody signs.
    _load_authority(folder)
    out = folder if out is None else out
    certificate_path, key_path = paths(out, name)
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = []
    if renew:
        key = load_key(key_path, missing="there is nothing to renew; issue it without --renew")
        names = _renewed_hosts(certificate_path, key, name=name, role=role)
    else:
        for path in (certificate_path, key_path):
            if path.exists():
                raise UsageError(
                    f"{path} exists already: add --renew for a new certificate of the same key, "
                    "or choose another name or folder"
                )
    if role is Role.COORDINATOR:
        named = [general_name(host) for host in hosts or ([] if names else _own_hosts())]
        names = list(dict.fromkeys([*names, *named]))
    if not renew:
        make_private_folder(out)
        _copy_authority(folder, out)
        write_key(key_path, key)
    certificate_path = sign(folder, key.public_key(), name, role=role, hosts=names, days=days, out=out)
    return TlsFiles(ca=out / f"{AUTHORITY}.crt", cert=certificate_path, key=key_path)


def sign(
    folder: Path,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    name: str,
    *,
    role: Role,
    hosts: Sequence[x509.GeneralName],
    days: int,
    out: Path,
) -> Path:
    """Writes `NAME.crt` for a key, and a copy of `ca.crt` beside it, to `out`; returns its path. Raises UsageError."""
    authority, authority_key = _load_authority(folder)
    starts, ends = _validity(days)
    certificate = _sign_leaf(
        authority,
        authority_key,
        public_key,
        name=name,
        role=role,
        hosts=hosts,
        starts=starts,
        ends=min(ends, authority.not_valid_after_utc),
    )
    make_private_folder(out)
    _copy_authority(folder, out)
    path, _ = paths(out, name)
    write(path, _certificate_pem(certificate))
    return path


def check_leaf(name: str, role: Role, hosts: Sequence[str]) -> None:
    """Raises UsageError for a name that no leaf can have, and for hosts of somebody whom nobody dials."""
    if check_name(name).lower() == AUTHORITY:
        raise UsageError(f"the name {name!r} is reserved for the authority's own files; choose another")
    if hosts and role is not Role.COORDINATOR:
        raise UsageError(f"--host is for coordinators alone: nobody dials a {role}")


def revoke(folder: Path, certificate_path: Path) -> Path:
    """Adds a certificate to `ca.crl` in the authority's `folder`, which is made if missing; returns its path.

    The list counts for as long as the authority. Raises UsageError for a certificate that the authority did not sign,
    and when a file cannot be read or written.
    """
    authority, key = _load_authority(folder)
    certificate, path = load_certificate(certificate_path), folder / f"{AUTHORITY}.crl"
    try:
        certificate.verify_directly_issued_by(authority)
        before = x509.load_pem_x509_crl(read(path)) if path.exists() else None
    except (ValueError, TypeError, InvalidSignature) as error:
        raise UsageError(
            f"{certificate_path} is not a certificate of the authority in {folder}, or {path} is no revocation list"
        ) from error
    now = datetime.now(UTC).replace(microsecond=0)
    dates = {entry.serial_number: entry.revocation_date_utc for entry in before or ()}
    dates.setdefault(certificate.serial_number, now)
    builder = x509.CertificateRevocationListBuilder(authority.subject, now, authority.not_valid_after_utc)
    for serial, date in dates.items():
        builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, date).build())
    number = before.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number + 1 if before else 1
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    revoked = builder.add_extension(authority_id, critical=False).sign(key, hashes.SHA256())
    write(path, revoked.public_bytes(serialization.Encoding.PEM))
    return path


def expiry(certificate_path: Path) -> datetime:
    """When the certificate ends (UTC). Raises UsageError if it cannot be read."""
    return load_certificate(certificate_path).not_valid_after_utc


def hosts_of(certificate_path: Path) -> list[str]:
    """The host names and IP addresses that a coordinator's certificate is for; raises UsageError."""
    return [str(known.value) for known in _hosts(load_certificate(certificate_path))]


def _sign_leaf(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    *,
    name: str,
    role: Role,
    hosts: Sequence[x509.GeneralName],
    starts: datetime,
    ends: datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, authority.subject, public_key, starts, ends)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(_PURPOSES[role]), critical=False)
    authority_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False
    )
    builder = builder.add_extension(subject_names(name, role, hosts), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def subject_names(name: str, role: Role, hosts: Sequence[x509.GeneralName]) -> x509.SubjectAlternativeName:
    """The identity, and the hosts of a coordinator, as certificates and requests have them."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"{URN_PREFIX}{role}:{name}"), *hosts])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey,
    starts: datetime,
    ends: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _validity(days: int) -> tuple[datetime, datetime]:
    if not 1 <= days <= _MAX_DAYS:
        raise UsageError(f"--days {days}: a certificate is valid for 1 to {_MAX_DAYS} days")
    now = datetime.now(UTC).replace(microsecond=0)
    return now - BACKDATE, now + timedelta(days=days)


def _own_hosts() -> list[str]:
    machine = socket.gethostname()
    return ["localhost", "127.0.0.1", "::1", *([machine] if _HOST.fullmatch(machine) else [])]


def general_name(host: str) -> x509.GeneralName:
    """A host name or an IP address; raises UsageError."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if _HOST.fullmatch(host) is None or len(host) > 253:
        raise UsageError(f"--host {host!r}: give a host name or an IP address, without scheme, port or path")
    return x509.DNSName(host)


def _renewed_hosts(
    certificate_path: Path, key: ec.EllipticCurvePrivateKey, *, name: str, role: Role
) -> list[x509.GeneralName]:
    """The hosts that the certificate of `key` names; none if that certificate is gone."""
    if not certificate_path.exists():
        return []
    pem = read(certificate_path)
    try:
        identity = identity_from_certificate(pem)
    except EnrollmentRefused as error:
        raise UsageError(f"{certificate_path}: {error}") from error
    certificate = x509.load_pem_x509_certificate(pem)
    if certificate.public_key() != key.public_key():
        raise UsageError(f"{certificate_path} does not belong to the key beside it; move one of them away")
    if (identity.name, identity.role) != (name, role):
        raise UsageError(
            f"{certificate_path} is for the {identity.role} {identity.name}: "
            "renewing keeps name and role; issue another name instead"
        )
    return _hosts(certificate)


def _hosts(certificate: x509.Certificate) -> list[x509.GeneralName]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [known for known in names if isinstance(known, x509.DNSName | x509.IPAddress)]


def _load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    certificate_path, key_path = paths(folder, AUTHORITY)
    missing = "make an authority first with `fedhds certs init`, or name its folder with --ca"
    certificate = load_certificate(certificate_path, missing=missing)
    key = load_key(key_path, missing=missing)
    if certificate.public_key() != key.public_key():
        raise UsageError(f"{certificate_path} does not belong to {key_path}; restore the pair from a backup")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise UsageError(
            f"{certificate_path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: "
            "make a new authority in another folder and issue every certificate again"
        )
    return certificate, key


def load_certificate(path: Path, *, missing: str = "") -> x509.Certificate:
    """The first certificate of a PEM file; raises UsageError."""
    try:
        certificate = x509.load_pem_x509_certificate(read(path, missing=missing))
        certificate.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not a PEM certificate that can be used here: {error}") from error
    return certificate


def load_key(path: Path, *, missing: str = "") -> ec.EllipticCurvePrivateKey:
    """A key that fedhds made; raises UsageError."""
    pem = read(path, missing=missing)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is not an unencrypted PEM key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{path} is not an elliptic-curve key; only keys that fedhds made can be used here")
    return key


def _copy_authority(folder: Path, out: Path) -> Path:
    source, copy = folder / f"{AUTHORITY}.crt", out / f"{AUTHORITY}.crt"
    pem = read(source)
    if not copy.exists():
        write(copy, pem)
    elif read(copy) != pem:
        raise UsageError(f"{copy} is another authority's certificate; choose another folder with --out")
    return copy


def paths(folder: Path, stem: str) -> tuple[Path, Path]:
    """Where certificate and key stand."""
    return folder / f"{stem}.crt", folder / f"{stem}.key"


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Unencrypted, for its owner alone; raises UsageError."""
    write(path, _key_pem(key), private=True)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def make_private_folder(folder: Path) -> None:
    """Made with mode 0700; raises UsageError."""
    try:
        make_folder(folder, private=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}") from error


def read(path: Path, *, missing: str = "") -> bytes:
    """A file's bytes; raises UsageError, which says `missing` of a file that is not there."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist" + (f": {missing}" if missing else "")) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all; raises UsageError."""
    try:
        replace_file(path, content, private=private, shared=True)
    except StorageError as error:
        raise UsageError(str(error)) from error
