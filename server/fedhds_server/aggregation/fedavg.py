"""FedIT's rule: the weighted mean of every tensor by itself (Zhang et al. 2023, Shepherd)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedhds.spec import AggregatorSpec
from fedhds.tensors.manifest import TensorSpec
from fedhds_server.aggregation.base import Aggregator, FloatArray, Shares


class FedAvg(Aggregator):
    """Weighted mean. The mean of A times the mean of B is not the mean of B A: the error grows with client drift."""

    description = "FedAvg: the mean of each tensor"

    def combine(
        self,
        parameters: AggregatorSpec,
        group: Sequence[TensorSpec],
        current: Sequence[FloatArray],
        shares: Shares,
        update: Callable[[int], Sequence[FloatArray]],
    ) -> Sequence[FloatArray]:
        # A running sum in float64 over updates in the order of sites: the result cannot depend on which came first,
        # and memory is that of one group.
        totals = [np.zeros(value.shape, dtype=np.float64) for value in current]
        for index, share in enumerate(shares):
            for total, values in zip(totals, update(index), strict=True):
                total += share * values
        return [total.astype(np.float32) for total in totals]
