"""The Gaussian mechanism on a site's centroids: clipping, noise, and what they cost in (epsilon, delta).

Epsilon is exact (Balle & Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", Thm 8), rounded
upwards in the last bits. Releases compose without loss as Gaussian differential privacy (Dong, Roth & Su 2019,
"Gaussian Differential Privacy", Cor. 2): a release with noise multiplier z is 1/z-GDP, and mu adds in squares.

Not claimed: these are real-number mechanisms computed in floating point. Mironov 2012 ("On Significance of the Least
Significant Bits for Differential Privacy") shows that the low bits of floating-point noise can tell neighboring
inputs apart. Releases are rounded to float32, which blunts that attack on doubles but is no proof against it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_SQRT2 = math.sqrt(2)


def clip(vectors: npt.ArrayLike, norm: float) -> FloatArray:
    """Scales every row of `vectors` (k, d) that is longer than `norm` (L2, above 0) down to it.

    Raises ValueError for a value that is not finite: clipping could not bound it. A row whose norm exceeds the
    largest double becomes zero.
    """
    if not norm > 0:
        raise ValueError(f"clipping norm {norm} is not above 0")
    rows = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("vectors to clip hold values that are not finite")
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    clipped: FloatArray = rows * np.minimum(1.0, norm / np.maximum(lengths, norm))
    return clipped


def centroid_sensitivity(*, clip_norm: float, released: int) -> float:
    """L2 sensitivity of `released` centroids of norm at most `clip_norm`, when a whole shard is replaced.

    Replacing the shard may turn every centroid round, so it is 2 * clip_norm * sqrt(released). Nothing smaller holds
    for one row either: which rows form a cluster depends on every row.
    """
    return 2 * clip_norm * math.sqrt(released)


def site_rng() -> random.Random:
    """The source of privacy noise: the operating system's, new for every draw, and never the run's seed.

    Cryptographic because padded centroids show bare noise: from that, the state of an ordinary generator, and with
    it the noise on the real centroids, could be worked out.
    """
    return random.SystemRandom()


def noised_centroids(
    centroids: npt.ArrayLike, *, clip_norm: float, noise_multiplier: float, released: int, rng: random.Random
) -> FloatArray:
    """Releases exactly `released` centroids (released, d) under Gaussian noise on every value.

    Takes the first `released` rows of `centroids` (k, d; k may be 0), clips each to `clip_norm`, fills up with zero
    rows, so that the number of clusters stays hidden, and adds noise of standard deviation
    `noise_multiplier * centroid_sensitivity(...)`.

    Unit: the client, under replacement of its whole shard; local, as the site itself adds the noise. The guarantee
    is `gaussian_epsilon(noise_multiplier=noise_multiplier, ...)` and lapses when `clip_norm`, `released` or d depend
    on the shard, when `rng` is not `site_rng()`, or when one release is drawn twice and both draws are sent.
    Raises ValueError for values that are not finite.
    """
    rows = clip(centroids, clip_norm)[:released]
    padded = np.zeros((released, rows.shape[1]))
    padded[: len(rows)] = rows
    std = noise_multiplier * centroid_sensitivity(clip_norm=clip_norm, released=released)
    noise = np.array([rng.gauss(0.0, std) for _ in range(padded.size)], dtype=np.float64)
    released_rows: FloatArray = padded + noise.reshape(padded.shape)
    return released_rows


def cluster_sensitivity(*, clip_norm: float) -> float:
    """L2 sensitivity of all clusters' sums and counts together, when one row of norm at most `clip_norm` is left out.

    Centers are given from outside, so that a row is in one cluster: it moves that cluster's sum by its own norm at most
    and its count by one. How many rows a shard has is public (zero-out adjacency).
    """
    return math.hypot(clip_norm, 1.0)


def noised_clusters(
    sums: npt.ArrayLike, counts: npt.ArrayLike, *, clip_norm: float, noise_multiplier: float, rng: random.Random
) -> tuple[FloatArray, FloatArray]:
    """Sums (k, d) and counts (k,) under Gaussian noise of deviation `noise_multiplier * cluster_sensitivity(...)`.

    Unit: one row, left out (zero-out adjacency); local, as the site itself adds the noise. `sums` must be over rows
    of norm at most `clip_norm`, and the clusters those of centers that do not depend on this shard but through earlier
    releases. Lapses when `rng` is not `site_rng()`, or when one release is drawn twice and both draws are sent.
    """
    std = noise_multiplier * cluster_sensitivity(clip_norm=clip_norm)
    values = np.column_stack([np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)])
    noise = np.array([rng.gauss(0.0, std) for _ in range(values.size)]).reshape(values.shape)
    noised = values + noise
    return noised[:, :-1], noised[:, -1]


def noised_counts(counts: npt.ArrayLike, *, noise_multiplier: float, rng: random.Random) -> npt.NDArray[np.int64]:
    """Counts (k,) of rows in disjoint bins under Gaussian noise of deviation `noise_multiplier`, rounded to integers.

    Unit: one row, left out: it changes one count by one, so the L2 sensitivity is 1. Rounding comes after the noise and
    costs nothing; so the guarantee is the Gaussian's, exactly, which it would not be of discrete Gaussian noise. Lapses
    where a row's bin depends on other rows, when `rng` is not `site_rng()`, or when one release is drawn twice.
    """
    values = np.asarray(counts, dtype=np.float64)
    noise = np.array([rng.gauss(0.0, noise_multiplier) for _ in range(values.size)]).reshape(values.shape)
    rounded: npt.NDArray[np.int64] = np.rint(values + noise).astype(np.int64)
    return rounded


def composed_multiplier(noise_multipliers: Iterable[float]) -> float:
    """Noise multiplier of the one Gaussian mechanism that equals these together; inf for none, 0 if one has no noise.

    Unit and adjacency must be the same for all of them.
    """
    multipliers = list(noise_multipliers)
    if not multipliers:
        return math.inf
    if min(multipliers) <= 0:
        return 0.0
    return 1 / math.hypot(*(1 / multiplier for multiplier in multipliers))


def gaussian_epsilon(*, noise_multiplier: float, delta: float, releases: int = 1) -> float:
    """Smallest epsilon for which `releases` Gaussian releases together are (epsilon, delta)-DP; inf without noise.

    `noise_multiplier`: standard deviation over L2 sensitivity, so unit and adjacency are those of the sensitivity;
    inf stands for no release at all. Raises ValueError for a negative multiplier or a delta outside (0, 1).
    """
    _check_delta(delta)
    if not noise_multiplier >= 0 or releases < 0:
        raise ValueError(f"noise multiplier {noise_multiplier} and releases {releases} must not be negative")
    if noise_multiplier == math.inf or releases == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    mu = math.sqrt(releases) / noise_multiplier
    target = math.log(delta)
    if _log_delta(0.0, mu) <= target:
        return 0.0
    # At this epsilon even the Chernoff bound on the normal tail, exp(-a^2 / 2) with a = mu/2 - epsilon/mu, is delta.
    high = mu * mu / 2 + mu * math.sqrt(-2 * target)
    return _bisect(lambda epsilon: _log_delta(epsilon, mu) <= target, inside=high, outside=0.0)


def calibrate_noise(*, epsilon: float, delta: float, releases: int = 1) -> float:
    """Smallest noise multiplier with which `releases` releases together stay within (epsilon, delta)-DP.

    The inverse of `gaussian_epsilon`. Raises ValueError for an epsilon that is not above 0 and finite, a delta
    outside (0, 1), or fewer than one release.
    """
    _check_delta(delta)
    if not 0 < epsilon < math.inf or releases < 1:
        raise ValueError(f"epsilon {epsilon} must be above 0 and finite, releases {releases} at least 1")
    target = math.log(delta)
    tail = math.sqrt(-2 * target)
    low = 2 * epsilon / (math.hypot(tail, math.sqrt(2 * epsilon)) + tail)
    high = 2 * low
    while _log_delta(epsilon, high) <= target:
        low, high = high, 2 * high
    return math.sqrt(releases) / _bisect(lambda mu: _log_delta(epsilon, mu) <= target, inside=low, outside=high)


def _bisect(within: Callable[[float], bool], *, inside: float, outside: float) -> float:
    """The last double that is `within` on the way from `inside` to `outside`.

    Not scipy's brentq: it returns a double on either side of the root, so that the guarantee could be missed.
    """
    while (middle := (inside + outside) / 2) not in (inside, outside):
        if within(middle):
            inside = middle
        else:
            outside = middle
    return inside


def _log_delta(epsilon: float, mu: float) -> float:
    """Natural logarithm of the delta that a mu-GDP mechanism has at `epsilon` (Balle & Wang 2018, eq. 6).

    delta = Phi(a) - e^epsilon Phi(-x) with a = mu/2 - epsilon/mu and x = mu/2 + epsilon/mu. As x^2 = a^2 + 2 epsilon,
    the second term is exp(-a^2 / 2) erfcx(x / sqrt 2) / 2, which neither overflows nor underflows early.
    """
    # Here, as scipy takes longer to import than --help may take.
    from scipy.special import erfcx

    a, x = mu / 2 - epsilon / mu, mu / 2 + epsilon / mu
    if a >= 0:
        delta = (math.erfc(-a / _SQRT2) - math.exp(-a * a / 2) * float(erfcx(x / _SQRT2))) / 2
        return math.log(delta) if delta > 0 else -math.inf
    difference = float(erfcx(-a / _SQRT2) - erfcx(x / _SQRT2))
    return math.log(difference / 2) - a * a / 2 if difference > 0 else -math.inf


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta} is not between 0 and 1")
