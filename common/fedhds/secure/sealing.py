"""Shares of a site's two secrets, sealed so that one other site alone can open them (ChaCha20-Poly1305, RFC 8439)."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedhds.errors import PeerNotVerified
from fedhds.secure.keys import RoundId, agreed_key
from fedhds.secure.shamir import SHARE_BYTES

_NONCE_BYTES, _TAG_BYTES = 12, 16
SEALED_BYTES = _NONCE_BYTES + 2 * SHARE_BYTES + _TAG_BYTES


def seal(
    round_id: RoundId, private: bytes, public: bytes, shares: bytes, *, sender: str, receiver: str, peers: bytes
) -> bytes:
    """Seals both shares, one behind the other, under the keys of sender and receiver; `peers` digests the list."""
    label = round_id.statement("sealed shares", sender, receiver, peers)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(agreed_key(private, public, label)).encrypt(nonce, shares, label)


def unseal(
    round_id: RoundId, private: bytes, public: bytes, sealed: bytes, *, sender: str, receiver: str, peers: bytes
) -> bytes:
    """The shares behind `seal`; raises PeerNotVerified when they were not sealed by `sender` for this very round."""
    label = round_id.statement("sealed shares", sender, receiver, peers)
    try:
        key = ChaCha20Poly1305(agreed_key(private, public, label))
        shares = key.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], label)
    except (InvalidTag, ValueError) as error:
        raise PeerNotVerified(f"the shares under the name {sender} are not what it sealed for {receiver}") from error
    if len(shares) != 2 * SHARE_BYTES:
        raise PeerNotVerified(f"the shares that {sender} sealed for {receiver} have another length than shares have")
    return shares
