"""Updates as integers modulo 2^32 whose sum over all sites cannot overflow, and the mean behind such a sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhds.secure.masks import Ring

WEIGHT_UNIT = 1 << 20
"""What the weights of all sites of a round add up to at most."""
HEADER_VALUES = 2
"""Integers before the tensors': the site's weight, and its loss."""
MAX_SITES = 256
"""Sites of a round: everyone talks to everyone, which grows with the square."""
MAX_LOSS = 64.0
"""Nats per token; a larger loss counts as this."""

_HALF = 1 << 31
# Steps of the loss per unit of weight: MAX_LOSS * WEIGHT_UNIT * 16 is half of what a signed sum holds.
_LOSS_STEPS = 16
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ring32:
    """How values become integers in a round of `sites` sites whose updates have an L2 norm of `clip_norm` at most.

    Each site sends its difference times its weight. No value is beyond `clip_norm`, the weights are `WEIGHT_UNIT` in
    all, and rounding adds less than 1 for each site: so the sum stays below 2^31 on both sides of zero.
    """

    clip_norm: float
    sites: int

    @property
    def scale(self) -> float:
        """Integer steps per unit of the mean."""
        return (_HALF - 2 - self.sites) / self.clip_norm

    def encode(self, values: Values, weight: int, noise: Values) -> Ring:
        """Values float64 (n,) times `weight`, rounded down or up by `noise` in [0, 1): on average the value itself."""
        bound = self.clip_norm * self.scale * (weight / WEIGHT_UNIT)
        steps = np.clip(values * (self.scale * (weight / WEIGHT_UNIT)), -bound, bound)
        return np.floor(steps + noise).astype(np.int64).astype(np.uint32)

    def decode(self, total: Ring, weight: int) -> Values:
        """The weighted mean, float64 (n,), behind the sum of what sites of `weight` in all encoded."""
        return total.view(np.int32).astype(np.float64) * (WEIGHT_UNIT / (self.scale * weight))

    def clip_factor(self, norm: float) -> float:
        """What a site multiplies its difference of the L2 norm `norm` with."""
        return min(1.0, self.clip_norm / norm) if norm else 1.0


def header(weight: int, loss: float) -> Ring:
    """The two integers before a site's tensors."""
    steps = round(min(max(loss, 0.0), MAX_LOSS) * weight * _LOSS_STEPS)
    return np.array([weight, steps], dtype=np.uint32)


def mean_loss(total: int, weight: int) -> float:
    """The weighted mean of the losses behind the sum of them."""
    return total / (weight * _LOSS_STEPS)
