"""Shamir's secret sharing over a prime field (Shamir 1979): any t shares give a secret, fewer say nothing of it."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence

PRIME = (1 << 256) + 297
"""The smallest prime above all secrets of 32 bytes."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret of 32 bytes, of 33 bytes each, for the points 1 to `count`; any `threshold` of them give it.

    Raises ValueError for a secret of another length and for a threshold that is not 1 to `count`.
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"a secret of {len(secret)} bytes cannot be split {threshold} of {count}")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return [_value(coefficients, point).to_bytes(SHARE_BYTES) for point in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret behind shares by point; as many as its threshold at least, else the result is no secret of anybody.

    Raises ValueError for shares that no `split` gives together.
    """
    points = sorted(shares)
    values = [int.from_bytes(shares[point]) for point in points]
    weights = _at_zero(tuple(points))
    secret = sum(weight * value for weight, value in zip(weights, values, strict=True)) % PRIME
    if not points or points[0] < 1 or max(values) >= PRIME or secret >> 256:
        raise ValueError("the shares belong to no secret")
    return secret.to_bytes(SECRET_BYTES)


def _value(coefficients: Sequence[int], point: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * point + coefficient) % PRIME
    return total


@functools.lru_cache(maxsize=8)
def _at_zero(points: tuple[int, ...]) -> list[int]:
    """Lagrange's weights of values at `points` in the value at 0; a round asks for the same ones again and again."""
    weights = []
    for point in points:
        numerator = denominator = 1
        for other in points:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return weights
