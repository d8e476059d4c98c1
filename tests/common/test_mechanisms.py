"""Clipping, noise and exact accounting of the Gaussian mechanism."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate

from fedhds.privacy import mechanisms
from fedhds.privacy.mechanisms import (
    calibrate_noise,
    centroid_sensitivity,
    clip,
    composed_multiplier,
    gaussian_epsilon,
    noised_centroids,
    site_rng,
)

DELTAS = st.sampled_from([1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 0.1])
MULTIPLIERS = st.floats(math.log(1e-3), math.log(1e3)).map(math.exp)
EPSILONS = st.floats(math.log(0.01), math.log(1e6)).map(math.exp)
VECTORS = hnp.arrays(np.float64, st.tuples(st.integers(0, 6), st.integers(1, 5)), elements=st.floats(-1e9, 1e9))


def integrated_delta(epsilon: float, mu: float) -> float:
    """The hockey-stick divergence of N(mu, 1) from N(0, 1), by quadrature of its definition."""
    start = epsilon / mu + mu / 2

    def excess(t: float) -> float:
        return math.exp(-((t - mu) ** 2) / 2) * -math.expm1(epsilon - mu * t + mu * mu / 2) / math.sqrt(2 * math.pi)

    middle = max(start, mu)
    value: float = integrate.quad(excess, start, middle, epsabs=1e-16)[0]
    return value + float(integrate.quad(excess, middle, middle + 40, epsabs=1e-16, limit=200)[0])


@pytest.mark.parametrize("multiplier", [0.05, 0.3, 1.0, 2.0, 10.0, 50.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
def test_epsilon_agrees_with_integration(multiplier: float, delta: float) -> None:
    epsilon = gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    assert integrated_delta(epsilon, 1 / multiplier) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(
    ("multiplier", "delta", "epsilon"),
    [
        # Solved with mpmath at 60 digits from delta = Phi(mu/2 - e/mu) - exp(e) Phi(-mu/2 - e/mu).
        (1.0, 1e-5, 4.377178095681225),
        (0.5, 1e-5, 9.9972561464343),
        (20.0, 1e-5, 0.1600420344581321),
        (0.001, 1e-5, 504263.8929206541),
        (1000.0, 1e-6, 0.002718219088813995),
    ],
)
def test_epsilon_matches_reference_values(multiplier: float, delta: float, epsilon: float) -> None:
    assert gaussian_epsilon(noise_multiplier=multiplier, delta=delta) == pytest.approx(epsilon, rel=1e-10)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("releases", [1, 7, 40])
def test_epsilon_is_below_the_renyi_bound(multiplier: float, releases: int) -> None:
    """The Renyi divergence of order a is a / (2 z^2); the conversion is Opacus's (Canonne, Kamath & Steinke 2020)."""
    delta = 1e-5
    orders = np.linspace(1.01, 200, 20_000)
    bounds = (
        releases * orders / (2 * multiplier**2)
        - (math.log(delta) + np.log(orders)) / (orders - 1)
        + np.log((orders - 1) / orders)
    )
    bound = float(bounds.min())
    exact = gaussian_epsilon(noise_multiplier=multiplier, delta=delta, releases=releases)
    assert 0.8 * bound < exact <= bound


@given(MULTIPLIERS, st.floats(1.001, 100), DELTAS)
def test_more_noise_costs_less(multiplier: float, factor: float, delta: float) -> None:
    more = gaussian_epsilon(noise_multiplier=multiplier * factor, delta=delta)
    less = gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    assert more < less or less == more == 0


@given(EPSILONS, st.floats(1.001, 100), DELTAS)
def test_a_smaller_epsilon_needs_more_noise(epsilon: float, factor: float, delta: float) -> None:
    assert calibrate_noise(epsilon=epsilon * factor, delta=delta) < calibrate_noise(epsilon=epsilon, delta=delta)


@given(MULTIPLIERS, DELTAS)
def test_a_smaller_delta_costs_more(multiplier: float, delta: float) -> None:
    epsilon = gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    assert gaussian_epsilon(noise_multiplier=multiplier, delta=delta / 3) >= epsilon


@given(EPSILONS, DELTAS, st.integers(1, 1000))
def test_calibration_is_the_inverse(epsilon: float, delta: float, releases: int) -> None:
    multiplier = calibrate_noise(epsilon=epsilon, delta=delta, releases=releases)
    spent = gaussian_epsilon(noise_multiplier=multiplier, delta=delta, releases=releases)
    assert spent == pytest.approx(epsilon, rel=1e-8)


@given(MULTIPLIERS, DELTAS)
def test_epsilon_is_the_inverse(multiplier: float, delta: float) -> None:
    epsilon = gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    if epsilon > 1e-6:
        assert calibrate_noise(epsilon=epsilon, delta=delta) == pytest.approx(multiplier, rel=1e-8)


@given(MULTIPLIERS, st.integers(1, 50), DELTAS)
def test_equal_releases_compose_to_one_gaussian(multiplier: float, releases: int, delta: float) -> None:
    together = composed_multiplier([multiplier] * releases)
    assert together == pytest.approx(multiplier / math.sqrt(releases))
    assert gaussian_epsilon(noise_multiplier=together, delta=delta) == pytest.approx(
        gaussian_epsilon(noise_multiplier=multiplier, delta=delta, releases=releases), rel=1e-9, abs=1e-12
    )


def test_no_release_costs_nothing_and_no_noise_costs_all() -> None:
    assert composed_multiplier([]) == math.inf
    assert gaussian_epsilon(noise_multiplier=math.inf, delta=1e-5) == 0
    assert composed_multiplier([3.0, 0.0]) == 0
    assert gaussian_epsilon(noise_multiplier=0.0, delta=1e-5) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "mu", "log_delta"),
    [
        # With mpmath at 60 digits; both sides of a = 0, far tails, and terms that nearly cancel.
        (0.0, 1e-3, -7.8266938538534757),
        (1e-3, 1e-3, -9.3923763840394127),
        (1e-2, 1e-3, -62.45587743776409),
        (1.0, 1.0, -2.0640664465003905),
        (4.0, 1.0, -9.9627618313077081),
        (3.0, 6.0, -0.010941788920298525),
        (40.0, 2.0, -186.72223106671727),
        (1000.0, 30.0, -172.36463913749145),
        (5e5, 1e3, -0.69394538280153281),
        (504e3, 1e3, -10.3643191362015),
    ],
)
def test_delta_matches_reference_values(epsilon: float, mu: float, log_delta: float) -> None:
    assert mechanisms._log_delta(epsilon, mu) == pytest.approx(log_delta, rel=1e-12)


@given(MULTIPLIERS, DELTAS)
def test_epsilon_is_rounded_upwards(multiplier: float, delta: float) -> None:
    mu, target = 1 / multiplier, math.log(delta)
    epsilon = gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    assert mechanisms._log_delta(epsilon, mu) <= target
    assert epsilon == 0 or mechanisms._log_delta(math.nextafter(epsilon, 0), mu) > target


@given(st.floats(0, 1e300))
def test_bisection_ends_at_the_last_double_inside(bound: float) -> None:
    assert mechanisms._bisect(lambda value: value >= bound, inside=1e300, outside=-1.0) == bound
    assert mechanisms._bisect(lambda value: value <= bound, inside=0.0, outside=1e301) == bound


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        gaussian_epsilon(noise_multiplier=1.0, delta=delta)
    with pytest.raises(ValueError, match="delta"):
        calibrate_noise(epsilon=1.0, delta=delta)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_multiplier_or_epsilon_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="multiplier"):
        gaussian_epsilon(noise_multiplier=value, delta=1e-5)
    with pytest.raises(ValueError, match="epsilon"):
        calibrate_noise(epsilon=value, delta=1e-5)


@given(VECTORS, st.floats(1e-6, 1e6))
def test_clipped_rows_are_short_and_keep_their_direction(vectors: np.ndarray, norm: float) -> None:
    clipped = clip(vectors, norm)
    lengths = np.linalg.norm(vectors, axis=1)
    assert clipped.shape == vectors.shape
    assert (np.linalg.norm(clipped, axis=1) <= norm * (1 + 1e-12)).all()
    assert np.array_equal(clipped[lengths <= norm], vectors[lengths <= norm])
    dots = (clipped * vectors).sum(axis=1)
    assert dots == pytest.approx(np.linalg.norm(clipped, axis=1) * lengths, rel=1e-9)


def test_clipping_bounds_the_largest_doubles() -> None:
    assert np.linalg.norm(clip([[1e308, 1e308]], 1.0)) <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_clipping_refuses_what_it_cannot_bound(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        clip([[value, 0.0]], 1.0)


def test_clipping_refuses_a_norm_of_zero() -> None:
    with pytest.raises(ValueError, match="not above 0"):
        clip([[1.0]], 0.0)


@settings(max_examples=50)
@given(VECTORS, VECTORS, st.integers(1, 5), st.floats(0.1, 10))
def test_two_shards_differ_by_no_more_than_the_sensitivity(
    one: np.ndarray, other: np.ndarray, released: int, norm: float
) -> None:
    other = np.resize(other, (len(other), one.shape[1]))

    def bare(rows: np.ndarray) -> np.ndarray:
        return noised_centroids(rows, clip_norm=norm, noise_multiplier=0.0, released=released, rng=random.Random(0))

    sensitivity = centroid_sensitivity(clip_norm=norm, released=released)
    assert np.linalg.norm(bare(one) - bare(other)) <= sensitivity * (1 + 1e-12)


@pytest.mark.parametrize("clusters", [0, 1, 3, 9])
def test_the_number_of_clusters_does_not_show(clusters: int) -> None:
    release = noised_centroids(
        np.full((clusters, 2), 7.0), clip_norm=1.0, noise_multiplier=1.0, released=4, rng=random.Random(0)
    )
    assert release.shape == (4, 2)
    assert np.unique(release).size == release.size


def test_noise_has_the_stated_deviation() -> None:
    release = noised_centroids(
        np.zeros((0, 2)), clip_norm=3.0, noise_multiplier=0.7, released=20_000, rng=random.Random(1)
    )
    assert release.std() == pytest.approx(0.7 * 2 * 3.0 * math.sqrt(20_000), rel=0.02)
    assert abs(release.mean()) < 0.02 * release.std()


def test_noise_owes_nothing_to_a_seed() -> None:
    def drawn() -> np.ndarray:
        random.seed(1)
        np.random.default_rng(1)
        return noised_centroids([[1.0, 1.0]], clip_norm=1.0, noise_multiplier=1.0, released=1, rng=site_rng())

    with warnings.catch_warnings():
        assert not np.array_equal(drawn(), drawn())
