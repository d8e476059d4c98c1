"""No server optimizer: the combined update is the next global adapter, as in FedAvg."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedhds_server.optimizers.base import FloatArray, ServerOptimizer


class NoOptimizer(ServerOptimizer):
    """Takes the combined update as it is."""

    def step(
        self,
        parameters: Any,
        value: FloatArray,
        combined: FloatArray,
        slots: Mapping[str, FloatArray],
        round_number: int,
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        return combined, {}
