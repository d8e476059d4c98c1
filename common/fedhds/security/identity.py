"""A peer's identity: the role and name that its certificate carries, pinned by the fingerprint of its key.

Both stand in one subject alternative name, `urn:fedhds:ROLE:NAME`. `cryptography` is imported where it is
used, so that the command line's `--help` and a federation without TLS do not pay for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from fedhds.errors import EnrollmentRefused, UsageError

if TYPE_CHECKING:
    from cryptography import x509

URN_PREFIX = "urn:fedhds:"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Role(StrEnum):
    """What the holder of a certificate may do."""

    SITE = "site"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"


@dataclass(frozen=True)
class PeerIdentity:
    """The holder of a certificate that the federation's authority signed."""

    name: str
    """1 to 64 of ASCII letters, digits, '.', '_' and '-'; never a '/', which parts a site from its shards."""
    role: Role
    key_fingerprint: str
    """SHA-256 of the SubjectPublicKeyInfo DER, in lower-case hex; a renewed certificate keeps it."""
    serial: str = field(default="", compare=False)
    """The certificate's serial number, in lower-case hex; a renewed certificate has another."""

    @property
    def urn(self) -> str:
        """The subject alternative name that states this identity."""
        return f"{URN_PREFIX}{self.role}:{self.name}"


def check_name(name: str) -> str:
    """`name` itself if a certificate can carry it; raises UsageError otherwise."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"the name {name!r} cannot be used: take 1 to 64 of the letters A-Z and a-z, digits, '.', '_' and '-'"
        )
    return name


def identity_from_certificate(pem: bytes) -> PeerIdentity:
    """The identity in the first certificate of `pem`; checks no signature, for TLS has done so.

    Raises EnrollmentRefused if there is no certificate, or if it does not carry exactly one well-formed urn.
    """
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    try:
        certificate = x509.load_pem_x509_certificate(pem)
        urns = _urns(certificate)
        public_key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise EnrollmentRefused(f"the certificate cannot be read: {error}") from error
    if len(urns) != 1:
        count = "no" if not urns else "more than one"
        raise EnrollmentRefused(
            f"the certificate carries {count} {URN_PREFIX}ROLE:NAME; have one issued with `fedhds certs issue`"
        )
    role, _, name = urns[0].removeprefix(URN_PREFIX).partition(":")
    if role not in {known.value for known in Role} or _NAME.fullmatch(name) is None:
        raise EnrollmentRefused(f"the certificate's identity {urns[0]!r} is malformed; have it issued again")
    return PeerIdentity(name, Role(role), hashlib.sha256(public_key).hexdigest(), f"{certificate.serial_number:x}")


def identity_of(auth_context: Mapping[str, Sequence[bytes]]) -> PeerIdentity | None:
    """The caller's identity, from `grpc.ServicerContext.auth_context()`; None when there is no TLS.

    Raises EnrollmentRefused if there is TLS, but no certificate or not one of this federation's making.
    """
    certificates = auth_context.get("x509_pem_cert", ())
    if certificates:
        return identity_from_certificate(certificates[0])
    if b"ssl" in auth_context.get("transport_security_type", ()):
        raise EnrollmentRefused("the peer showed no certificate; start it with --tls-cert and --tls-key")
    return None


def _urns(certificate: x509.Certificate) -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    # A urn's scheme and namespace are case-insensitive: an odd spelling must count as one more, not pass unseen.
    return [uri for uri in uris if uri.lower().startswith(URN_PREFIX)]
