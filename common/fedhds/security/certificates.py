"""Certificates in files: the keys that gRPC takes, who signed them, and whether they count now.

`cryptography` is imported where it is used, for the command line's `--help` reads this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import SettingsError

if TYPE_CHECKING:
    from cryptography import x509

# Keys that grpcio 1.85 takes, tried one by one: of a certificate's own end, and of one that signed another.
OWN_KEYS = frozenset({"RSA", "secp256r1", "secp384r1"})
ISSUER_KEYS = OWN_KEYS | {"secp224r1", "secp521r1", "Ed25519"}


def read(flag: str, path: Path) -> bytes:
    """A file's bytes; raises SettingsError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(flag, f"{path} cannot be read: {error.strerror}; check path and rights") from error


def load_certificates(flag: str, path: Path) -> list[x509.Certificate]:
    """All certificates of a PEM file; raises SettingsError."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(read(flag, path))
    except ValueError as error:
        raise SettingsError(flag, f"{path} holds no PEM certificate: {error}") from error


def chains(
    leaf: x509.Certificate, intermediates: Sequence[x509.Certificate], authorities: Sequence[x509.Certificate]
) -> bool:
    """Whether signatures lead from `leaf` to one of `authorities`."""
    if any(_signed(leaf, authority) for authority in authorities):
        return True
    return any(
        _signed(leaf, issuer) and chains(issuer, [*intermediates[:index], *intermediates[index + 1 :]], authorities)
        for index, issuer in enumerate(intermediates)
    )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def check_public_key(flag: str, path: Path, certificate: x509.Certificate, kinds: frozenset[str]) -> None:
    """Raises SettingsError for a key that gRPC refuses in the handshake: all that it says then is UNAVAILABLE."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    try:
        key = certificate.public_key()
    except (UnsupportedAlgorithm, ValueError) as error:
        kind = f"unknown ({error})"
    else:
        kind = (
            key.curve.name if isinstance(key, EllipticCurvePublicKey) else type(key).__name__.removesuffix("PublicKey")
        )
    if kind not in kinds:
        raise SettingsError(
            flag,
            f"{path} has a key of the kind {kind}, which gRPC does not take; it takes {', '.join(sorted(kinds))}, and "
            "what `fedhds certs` makes",
        )


def check_dates(flag: str, path: Path, certificate: x509.Certificate, remedy: str) -> None:
    """Raises SettingsError for a certificate that does not count now."""
    now = datetime.now(UTC)
    if certificate.not_valid_after_utc <= now:
        raise SettingsError(
            flag,
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; {remedy}",
        )
    if certificate.not_valid_before_utc > now:
        raise SettingsError(
            flag,
            f"{path} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; "
            "check this machine's clock",
        )
