"""How often something may happen for each of many keys: some times at once, then at a steady rate."""

from __future__ import annotations

import time

# Keys that are remembered; those that have all their times again are forgotten beyond.
_MAX_KEYS = 4096


class Rates:
    """Token buckets by key."""

    def __init__(self, burst: int, per_s: float) -> None:
        self._burst = float(burst)
        self._per_s = per_s
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, key: str) -> bool:
        """Whether it may happen now; it is counted if so."""
        now = time.monotonic()
        if len(self._left) >= _MAX_KEYS and key not in self._left:
            self._left = {known: left for known, left in self._left.items() if self._filled(left, now) < self._burst}
        left = self._filled(self._left.get(key, (self._burst, now)), now)
        allowed = left >= 1
        self._left[key] = left - allowed, now
        return allowed

    def _filled(self, left: tuple[float, float], now: float) -> float:
        return min(left[0] + (now - left[1]) * self._per_s, self._burst)
