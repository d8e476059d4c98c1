"""What releases cost together in (epsilon, delta): closed forms where they exist, Opacus' accountants for DP-SGD.

Sampled steps compose numerically (Gopi, Lee & Wutschitz 2021, "Numerical Composition of Differential Privacy"), with
Opacus' bounds on the errors added: the epsilon is never too small. Where that computation has no result, for a delta
near the precision of doubles, the looser bound by Renyi differential privacy (Mironov 2017) is taken.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fedhds.privacy.mechanisms import composed_multiplier, gaussian_epsilon

# Noise multipliers are searched to this share above the smallest one.
_TOLERANCE = 0.005
# Less noise hides nothing, more leaves nothing of any gradient.
_MIN_MULTIPLIER, _MAX_MULTIPLIER = 0.05, 1e4


@dataclass(frozen=True, order=True)
class Cost:
    """`steps` Gaussian releases, each over a Poisson sample of the rows in which every row is with `sample_rate`.

    Unit and adjacency are those of the sensitivity that `noise_multiplier` is relative to.
    """

    noise_multiplier: float
    """Standard deviation over L2 sensitivity; 0: no noise."""
    sample_rate: float = 1.0
    """1: the release is over all rows."""
    steps: int = 1
    replaced: bool = False
    """The row is not left out but another takes its place, for the rows that train were picked by what they say."""


def epsilon_of(costs: Iterable[Cost], *, delta: float) -> float:
    """Smallest known epsilon for which all of `costs` together are (epsilon, delta)-DP; inf if one has no noise.

    All must be of one privacy unit. Exact without sampling. Raises ValueError for a delta outside (0, 1).
    """
    plain: list[float] = []
    sampled: defaultdict[tuple[float, float], int] = defaultdict(int)
    replaced = False
    for cost in costs:
        if not cost.steps:
            continue
        if cost.sample_rate >= 1 or not cost.noise_multiplier:
            # Two rows differ: the sum moves by twice the clipping norm at most.
            single = cost.noise_multiplier / (2 if cost.replaced else 1)
            plain.append(single / math.sqrt(cost.steps))
        else:
            sampled[cost.noise_multiplier, cost.sample_rate] += cost.steps
            replaced |= cost.replaced
    multiplier = composed_multiplier(plain)
    if not sampled or not multiplier:
        return gaussian_epsilon(noise_multiplier=multiplier, delta=delta)
    history = sorted((noise, rate, steps) for (noise, rate), steps in sampled.items())
    if multiplier < math.inf:
        history.append((multiplier, 1.0, 1))
    return _pair_epsilon(tuple(history), delta) if replaced else _epsilon(tuple(history), delta)


def calibrate(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, replaced: bool = False, spent: Iterable[Cost] = ()
) -> float | None:
    """Noise multiplier of `steps` sampled steps that stay, together with `spent`, within (epsilon, delta)-DP.

    At most 0.5 percent above the smallest one; None when no noise is enough.
    """
    before = tuple(spent)

    def within(multiplier: float) -> bool:
        cost = Cost(multiplier, sample_rate, steps, replaced)
        return epsilon_of((*before, cost), delta=delta) <= epsilon

    if epsilon_of(before, delta=delta) >= epsilon:
        return None
    high = 1.0
    while not within(high):
        high *= 2
        if high > _MAX_MULTIPLIER:
            return None
    low = high / 2
    while high <= 1 and low > _MIN_MULTIPLIER and within(low):
        low, high = low / 2, low
    while high > low * (1 + _TOLERANCE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


@functools.lru_cache(maxsize=1024)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    # Here, as Opacus imports torch, which no command may wait for that has nothing to compute.
    import numpy as np
    from opacus.accountants import PRVAccountant, RDPAccountant

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            accountant = PRVAccountant()
            accountant.history = list(history)
            epsilon = float(accountant.get_epsilon(delta))
            if math.isfinite(epsilon):
                return max(0.0, epsilon)
        except (ValueError, RuntimeError, ArithmeticError):
            pass
        bound = RDPAccountant()
        bound.history = list(history)
        return float(bound.get_epsilon(delta))


def _pair_epsilon(history: tuple[tuple[float, float, int], ...], delta: float) -> float:
    """Epsilon when one row takes another's place: one is left out and one is added, a group of two.

    Two steps of (e, d)-DP are (2 e, d (1 + exp e))-DP (Dwork & Roth 2014, Thm 2.2, and its proof).
    """
    part = delta / 2
    while part > 0:
        epsilon = _epsilon(history, part)
        if epsilon > 300:
            return math.inf
        if part * (1 + math.exp(epsilon)) <= delta:
            return 2 * epsilon
        part = min(0.7 * part, delta / (1 + math.exp(epsilon)))
    return math.inf
