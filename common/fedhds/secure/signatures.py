"""Signatures with the keys of mTLS certificates, and whether a certificate is of the run's authority and of a site."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedhds.errors import EnrollmentRefused, PeerNotVerified
from fedhds.security.credentials import TlsFiles
from fedhds.security.identity import Role, identity_from_certificate

_PSS = padding.PSS(padding.MGF1(SHA256()), padding.PSS.DIGEST_LENGTH)
# The certificate, two intermediate ones and some room.
_MAX_CERTIFICATES = 4


class Signer:
    """The private key and the chain of this process's own certificate."""

    def __init__(self, files: TlsFiles) -> None:
        key = load_pem_private_key(files.key.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
            raise PeerNotVerified(f"{files.key} is neither an RSA nor an elliptic-curve key, and signs no round")
        self._key = key
        self.certificates = [
            certificate.public_bytes(Encoding.DER)
            for certificate in x509.load_pem_x509_certificates(files.cert.read_bytes())
        ]
        """In DER, the own one first."""

    def sign(self, statement: bytes) -> bytes:
        """A signature over a statement; another one at each call."""
        if isinstance(self._key, rsa.RSAPrivateKey):
            return self._key.sign(statement, _PSS, SHA256())
        return self._key.sign(statement, ec.ECDSA(SHA256()))


def public_key_of_certificate(certificate: bytes) -> bytes:
    """The SubjectPublicKeyInfo (DER) of a certificate in DER; raises PeerNotVerified for bytes that are none."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise PeerNotVerified("a peer's certificate cannot be read") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def check_signature(public_key: bytes, signature: bytes, statement: bytes, signer: str) -> None:
    """Raises PeerNotVerified unless the key (SubjectPublicKeyInfo in DER) signed the statement."""
    try:
        key = load_der_public_key(public_key)
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, statement, _PSS, SHA256())
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, statement, ec.ECDSA(SHA256()))
        else:
            raise PeerNotVerified(f"the certificate of {signer} has a key that signs no round")
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise PeerNotVerified(
            f"{signer} did not sign what stands under its name for this run and round; somebody changed it on the way, "
            "or took it from another round"
        ) from error


class Authority:
    """The run's certificate authority, by which a site judges the others."""

    def __init__(self, ca: Path) -> None:
        self._authorities = x509.load_pem_x509_certificates(ca.read_bytes())

    def public_key_of(self, certificates: Sequence[bytes], site: str) -> bytes:
        """The public key (SubjectPublicKeyInfo in DER) of the certificate that gives the name `site`.

        `certificates` are the site's and intermediate ones, in DER. Raises PeerNotVerified when they do not lead to
        the authority, are not a site's, have expired, or give another name.
        """
        if not 0 < len(certificates) <= _MAX_CERTIFICATES:
            raise PeerNotVerified(f"{site} shows {len(certificates)} certificates; 1 to {_MAX_CERTIFICATES} are read")
        try:
            leaf, *intermediates = map(x509.load_der_x509_certificate, certificates)
            # Not the signatures alone: a site's own certificate must not vouch for another one.
            verifier = PolicyBuilder().store(Store(self._authorities)).time(datetime.now(UTC)).build_client_verifier()
            verifier.verify(leaf, intermediates)
            identity = identity_from_certificate(leaf.public_bytes(Encoding.PEM))
        except (ValueError, VerificationError, UnsupportedAlgorithm, EnrollmentRefused) as error:
            raise PeerNotVerified(
                f"the certificate under the name {site} is not valid under the authority of this federation ({error}); "
                "check that all sites have the same ca.crt"
            ) from error
        if identity.role is not Role.SITE or identity.name != site.partition("/")[0]:
            raise PeerNotVerified(f"the certificate under the name {site} is for the {identity.role} {identity.name}")
        return public_key_of_certificate(certificates[0])
