"""Updates as integers: no sum of honest sites overflows, and rounding favors no side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.secure.quantization import MAX_LOSS, MAX_SITES, WEIGHT_UNIT, Ring32, header, mean_loss
from fedhds.secure.terms import integer_weights


@given(
    st.sampled_from([3, 5, 100, MAX_SITES]),
    st.sampled_from([1e-6, 0.3, 10.0, 1e6]),
    st.integers(0, 2**32),
    st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_largest_updates_of_all_sites_fit_into_the_ring(sites: int, clip: float, seed: int, sign: float) -> None:
    random = np.random.default_rng(seed)
    ring = Ring32(clip, sites)
    shares = random.dirichlet(np.full(sites, 0.2))
    weights = integer_weights({str(index): share for index, share in enumerate(shares)})
    assert min(weights.values()) >= 1
    assert sum(weights.values()) <= WEIGHT_UNIT
    total, exact = np.zeros(3, dtype=np.uint32), np.zeros(3, dtype=np.int64)
    for weight in weights.values():
        # One value has the whole norm, at every site; and what a faulty site may have counts as the norm.
        steps = ring.encode(np.array([sign * clip, sign * 9 * clip, 0.0]), weight, random.random(3))
        total += steps
        exact += steps.view(np.int32)
    assert np.abs(exact).max() < 1 << 31
    assert (total.view(np.int32) == exact).all()
    mean = ring.decode(total, sum(weights.values()))
    assert mean == pytest.approx([sign * clip, sign * clip, 0.0], rel=1e-4, abs=clip * 1e-4)


def test_rounding_is_right_on_average() -> None:
    """The mean of 40,000 roundings has a standard deviation of 0.0025 at most; a false alarm is five of them."""
    ring, value = Ring32(1.0, 4), np.full(40_000, 0.3)
    steps = ring.encode(value / ring.scale, WEIGHT_UNIT, np.random.default_rng(7).random(40_000))
    assert set(steps.tolist()) == {0, 1}
    assert abs(steps.mean() - 0.3) < 0.0125


def test_longer_updates_are_clipped_and_shorter_ones_are_not() -> None:
    ring = Ring32(2.0, 3)
    assert ring.clip_factor(0.0) == ring.clip_factor(1.9) == 1.0
    assert ring.clip_factor(8.0) == 0.25


def test_losses_add_up_to_their_weighted_mean() -> None:
    total = header(1000, 2.5) + header(3000, 1.5) + header(WEIGHT_UNIT - 4000, MAX_LOSS * 2)
    assert total[0] == WEIGHT_UNIT
    assert mean_loss(int((header(1000, 2.5) + header(3000, 1.5))[1]), 4000) == pytest.approx(1.75, abs=1e-4)
    # No sum of losses wraps around.
    assert mean_loss(int(total[1]), WEIGHT_UNIT) == pytest.approx(MAX_LOSS, rel=0.01)
    assert header(5, -1.0)[1] == 0
