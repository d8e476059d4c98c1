"""FedIT's rule: the mean of A and of B, each by itself, weighted by rows (Zhang et al. 2023, Shepherd)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedhds.tensors.manifest import FloatArray
from fedhds_server.aggregation.base import Aggregator


class FedAvg(Aggregator):
    """Weighted mean. The mean of A times the mean of B is not the mean of B A: the error grows with client drift."""

    def fold(self, current: FloatArray, shares: np.ndarray, update: Callable[[int], FloatArray]) -> FloatArray:
        # A running sum in float64 over updates in site order: the result cannot depend on who came first, and
        # memory is that of one tensor.
        total = np.zeros(current.shape, dtype=np.float64)
        for index, share in enumerate(shares):
            total += share * update(index)
        return total.astype(np.float32)
