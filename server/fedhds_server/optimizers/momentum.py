"""FedAvgM: server momentum (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution", Sec. 4.3)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedhds.spec import MomentumSpec
from fedhds_server.optimizers.base import FloatArray, ServerOptimizer, rounded


class Momentum(ServerOptimizer):
    """m <- momentum * m + (combined - value); value <- value + m."""

    slots = ("momentum",)

    def step(
        self,
        parameters: MomentumSpec,
        value: FloatArray,
        combined: FloatArray,
        slots: Mapping[str, FloatArray],
        round_number: int,
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        # In float64, rounded once, and within what float32 holds.
        moved = parameters.momentum * slots["momentum"].astype(np.float64) + (combined.astype(np.float64) - value)
        return rounded(value + moved), {"momentum": rounded(moved)}
