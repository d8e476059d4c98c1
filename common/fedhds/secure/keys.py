"""Keys of one round: X25519 pairs, what two sites derive from them (HKDF, RFC 5869), and what a statement says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedhds.errors import PeerNotVerified

KEY_BYTES = 32
_DOMAIN = "fedhds secure aggregation 1"


@dataclass(frozen=True, slots=True)
class RoundId:
    """Which round of which run: part of all that is signed, derived or sealed, so nothing serves another round."""

    run_id: str
    number: int

    def statement(self, subject: str, *parts: str | bytes | int) -> bytes:
        """Bytes that say `parts` of `subject` in this round; two different ones are never equal."""
        encoded = bytearray()
        for part in (_DOMAIN, self.run_id, self.number, subject, *parts):
            value = part if isinstance(part, bytes) else str(part).encode()
            encoded += len(value).to_bytes(8) + value
        return bytes(encoded)

    def digest(self, subject: str, *parts: str | bytes | int) -> bytes:
        """SHA-256 of such a statement."""
        return hashlib.sha256(self.statement(subject, *parts)).digest()


def new_private_key() -> bytes:
    """A fresh X25519 private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key_of(private: bytes) -> bytes:
    """The public half of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed_key(private: bytes, public: bytes, info: bytes) -> bytes:
    """The 32 bytes that the holders of two pairs derive for the purpose `info`.

    Raises PeerNotVerified for a public key that is none.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PeerNotVerified("a peer's public key is none; the round cannot go on with it") from error
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(shared)


def derived_key(secret: bytes, info: bytes) -> bytes:
    """The 32 bytes that follow from a uniform secret for the purpose `info`."""
    return HKDFExpand(SHA256(), KEY_BYTES, info=info).derive(secret)


def pair_key(round_id: RoundId, private: bytes, public: bytes, one: str, other: str) -> bytes:
    """The key of the mask that the sites `one` and `other` share, the same for both."""
    return agreed_key(private, public, round_id.statement("pair mask", *sorted((one, other))))


def self_key(round_id: RoundId, seed: bytes, site: str) -> bytes:
    """The key of the mask that a site adds for itself."""
    return derived_key(seed, round_id.statement("self mask", site))
