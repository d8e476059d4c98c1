"""Keys, masks and seals of a round: equal at both ends, of this round alone, and never twice."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st

from fedhds.errors import PeerNotVerified
from fedhds.secure.keys import RoundId, agreed_key, new_private_key, pair_key, public_key_of, self_key
from fedhds.secure.masks import MaskStream, apply_masks, uniform
from fedhds.secure.sealing import SEALED_BYTES, seal, unseal

ROUND = RoundId("run", 3)
OTHERS = [RoundId("run", 4), RoundId("other", 3), RoundId("run\x00", 3)]


@given(st.lists(st.lists(st.text(max_size=3) | st.binary(max_size=3) | st.integers(0, 99), max_size=3), min_size=2))
def test_different_statements_are_never_equal(statements: list[list[str | bytes | int]]) -> None:
    # A number is the text that it is written with, and text its UTF-8.
    plain = [tuple(part if isinstance(part, bytes) else str(part).encode() for part in parts) for parts in statements]
    assert len({ROUND.statement("s", *parts) for parts in statements}) == len(set(plain))


def test_both_ends_derive_one_key_and_each_round_and_pair_another() -> None:
    one, other = new_private_key(), new_private_key()
    key = pair_key(ROUND, one, public_key_of(other), "a", "b")
    assert key == pair_key(ROUND, other, public_key_of(one), "b", "a")
    rest = {pair_key(round_id, one, public_key_of(other), "a", "b") for round_id in OTHERS}
    rest |= {pair_key(ROUND, one, public_key_of(other), "a", "c"), self_key(ROUND, one, "a"), self_key(ROUND, one, "b")}
    rest |= {agreed_key(one, public_key_of(other), ROUND.statement("sealed shares", "a", "b", b""))}
    assert len(rest | {key}) == len(rest) + 1 == len(OTHERS) + 5


@pytest.mark.parametrize("public", [bytes(32), b"\x01" + bytes(31), bytes(31)])
def test_a_public_key_that_gives_everybody_the_same_secret_is_refused(public: bytes) -> None:
    with pytest.raises(PeerNotVerified, match="is none"):
        agreed_key(new_private_key(), public, b"")


def test_a_mask_is_chacha20_and_comes_off_again_in_pieces_of_any_size() -> None:
    key = bytes(range(32))
    values = np.arange(200_000, dtype=np.uint32)
    masked = values.copy()
    apply_masks(masked, [MaskStream(key), MaskStream(bytes(32), subtract=True)])
    # RFC 8439's cipher, by the AEAD on top of it, which begins with the block that is numbered 1.
    zeros = ChaCha20Poly1305(key).encrypt(bytes(12), bytes(64), None)[:64]
    mask = np.zeros(32, dtype=np.uint32)
    apply_masks(mask, [MaskStream(key)])
    assert mask[16:].tobytes() == zeros[:64]
    off = [MaskStream(key, subtract=True), MaskStream(bytes(32))]
    for begin, end in ((0, 2), (2, 70_003), (70_003, 200_000)):
        apply_masks(masked[begin:end], off)
    assert (masked == values).all()
    assert 0.49 < uniform(MaskStream(key), 100_000).mean() < 0.51


def test_only_the_receiver_opens_a_seal_and_only_as_it_was_sealed() -> None:
    sender, receiver = new_private_key(), new_private_key()
    shares, peers = bytes(range(66)), b"p" * 32

    def opened(sealed: bytes, round_id: RoundId = ROUND, private: bytes = receiver, **names: object) -> bytes:
        labels = {"sender": "a", "receiver": "b", "peers": peers, **names}
        return unseal(round_id, private, public_key_of(sender), sealed, **labels)  # type: ignore[arg-type]

    sealed = [
        seal(ROUND, sender, public_key_of(receiver), shares, sender="a", receiver="b", peers=peers) for _ in range(2)
    ]
    assert opened(sealed[0]) == opened(sealed[1]) == shares
    assert sealed[0] != sealed[1]
    assert len(sealed[0]) == SEALED_BYTES
    broken = [
        lambda: opened(sealed[0][:-1] + bytes([sealed[0][-1] ^ 1])),
        lambda: opened(b""),
        lambda: opened(sealed[0], OTHERS[0]),
        lambda: opened(sealed[0], private=new_private_key()),
        lambda: opened(sealed[0], sender="c"),
        lambda: opened(sealed[0], receiver="c"),
        lambda: opened(sealed[0], peers=b"q" * 32),
    ]
    for attempt in broken:
        with pytest.raises(PeerNotVerified, match="not what it sealed"):
            attempt()
