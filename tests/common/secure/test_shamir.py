"""Shamir's secret sharing against an independent package, and what fewer shares than the threshold say."""

from __future__ import annotations

from collections import Counter

import pytest
import shamirs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.secure import shamir

SECRETS = st.binary(min_size=32, max_size=32)


@st.composite
def splits(draw: st.DrawFn) -> tuple[bytes, int, list[int]]:
    """A secret, a threshold, and the points of at least as many shares."""
    count = draw(st.integers(2, 12))
    threshold = draw(st.integers(2, count))
    points = draw(st.lists(st.integers(1, count), min_size=threshold, max_size=count, unique=True))
    return draw(SECRETS), threshold, points


@given(splits())
@settings(max_examples=60, deadline=None)
def test_an_independent_package_reads_our_shares_and_we_read_its(case: tuple[bytes, int, list[int]]) -> None:
    secret, threshold, points = case
    count = max(points)
    ours = shamir.split(secret, threshold, count)
    assert shamir.combine({point: ours[point - 1] for point in points}) == secret
    value = int.from_bytes(secret)
    given_shares = [shamirs.share(point, int.from_bytes(ours[point - 1]), shamir.PRIME) for point in points]
    assert shamirs.interpolate(given_shares, threshold=len(points)) == value
    theirs = shamirs.shares(value, quantity=count, modulus=shamir.PRIME, threshold=threshold)
    chosen = {share.index: share.value.to_bytes(shamir.SHARE_BYTES) for share in theirs if share.index in points}
    assert shamir.combine(chosen) == secret


def test_the_modulus_is_a_prime_above_every_secret() -> None:
    # Fermat's test to many bases: a composite number that passes all of them is not what anybody finds by chance.
    assert shamir.PRIME > 1 << 256
    assert all(pow(base, shamir.PRIME - 1, shamir.PRIME) == 1 for base in range(2, 60))
    assert not any(pow(3, number - 1, number) == 1 for number in range((1 << 256) + 1, shamir.PRIME, 2))


def test_fewer_shares_than_the_threshold_are_the_same_for_every_secret() -> None:
    """Leading bits of one share of two, for two secrets: uniform (chi-square of 15 degrees, false alarm below 1e-6)."""
    for secret in (bytes(32), bytes([255]) * 32):
        cells = Counter(shamir.split(secret, 2, 2)[0][1] >> 4 for _ in range(1600))
        assert sum((cells[cell] - 100) ** 2 / 100 for cell in range(16)) < 60
    with pytest.raises(ValueError, match="no secret"):
        # Almost every value is beyond no secret; this one is.
        shamir.combine({1: (shamir.PRIME - 1).to_bytes(33)})


@pytest.mark.parametrize(("length", "threshold", "count"), [(31, 1, 2), (33, 1, 2), (32, 0, 2), (32, 3, 2)])
def test_what_cannot_be_split_is_refused(length: int, threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        shamir.split(bytes(length), threshold, count)
