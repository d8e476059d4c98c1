"""Rules that move a center towards the updates, step by step; the first center is the global adapter."""

from __future__ import annotations

import numpy as np

from fedhds.spec.robust import ActiveRobustSpec, CenteredClippingSpec
from fedhds_server.aggregation.robust.base import DistanceRule, Doubles, squared_distances_to

# Weiszfeld's steps shrink geometrically; what is still missing after these is below float32.
_MAX_STEPS = 200
_TOLERANCE = 1e-9
# Of the median distance; RFA takes 1e-6 of vectors whose distances are about 1.
_SMOOTHING = 1e-6


def weiszfeld(gram: Doubles, smoothing: float, steps: int) -> Doubles:
    """Weights (n,) of the geometric median after so many steps, with distances of `smoothing` at least."""
    weights = np.zeros(len(gram))
    for _ in range(steps):
        inverse = 1 / np.maximum(np.sqrt(squared_distances_to(gram, weights)), smoothing)
        new = inverse / inverse.sum()
        moved, weights = np.abs(new - weights).sum(), new
        if moved < _TOLERANCE:
            break
    return weights


class GeometricMedian(DistanceRule):
    """RFA (Pillutla et al. 2022, "Robust Aggregation for Federated Learning", Alg. 2): Weiszfeld, smoothed."""

    description = "RFA: the geometric median of the updates"

    def weights(self, parameters: ActiveRobustSpec, gram: Doubles) -> Doubles:
        count = len(gram)
        spread = np.sqrt(squared_distances_to(gram, np.full(count, 1 / count)))
        # Equal updates have no spread but that of rounding, and the first updates of all may be zeros.
        rounding = 1e-9 * float(np.sqrt(np.diagonal(gram).max()))
        smoothing = max(_SMOOTHING * float(np.median(spread)), rounding) or 1.0
        return weiszfeld(gram, smoothing, _MAX_STEPS)


class CenteredClipping(DistanceRule):
    """v <- v + mean of (x - v) min(1, radius / |x - v|) (Karimireddy et al. 2021, "Learning from History", Alg. 2)."""

    description = "centered clipping: the mean of updates that are clipped around it"

    def weights(self, parameters: CenteredClippingSpec, gram: Doubles) -> Doubles:
        count = len(gram)
        weights = np.zeros(count)
        for _ in range(parameters.iterations):
            distances = np.sqrt(squared_distances_to(gram, weights))
            radius = parameters.radius or float(np.median(distances))
            factors = np.minimum(1, np.divide(radius, distances, out=np.ones(count), where=distances > 0)) / count
            weights = factors + (1 - factors.sum()) * weights
        return weights
