"""The interface of robust rules: some look at distances between whole updates, others at each value by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class RobustRule(ABC):
    """Implementations MUST depend on nothing but their arguments; `parameters` is their part of the specification."""

    description: ClassVar[str]
    """What the rule takes of the updates, for the model card."""


class DistanceRule(RobustRule):
    """Weighs whole updates by where they are; the aggregator then combines them with these weights."""

    @abstractmethod
    def weights(self, parameters: Any, gram: Doubles) -> Doubles:
        """Weights (n,) of n updates, none below 0, that sum to at most 1; the rest is the global adapter's.

        `gram` (n, n) has the inner products of what the updates change. It MUST be all that the weights depend on.
        """


class CoordinateRule(RobustRule):
    """Combines each value by itself."""

    @abstractmethod
    def combine(self, parameters: Any, values: Doubles) -> Doubles:
        """The values (size,) of `values` (n, size) of n updates."""


def squared_distances(gram: Doubles) -> Doubles:
    """Squared distances (n, n) between vectors with these inner products."""
    squares = np.diagonal(gram)
    distances: Doubles = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return distances


def squared_distances_to(gram: Doubles, weights: Doubles) -> Doubles:
    """Squared distances (n,) of vectors with these inner products to their sum with `weights` (n,)."""
    products = gram @ weights
    distances: Doubles = np.maximum(np.diagonal(gram) - 2 * products + weights @ products, 0)
    return distances
