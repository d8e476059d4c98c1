"""The interface of server optimizers (Reddi et al. 2021, "Adaptive Federated Optimization", Alg. 1 and 2)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


class ServerOptimizer(ABC):
    """Steps from the global adapter towards the combined update, tensor by tensor.

    Implementations MUST depend on nothing but their arguments. What they remember from round to round are `slots`:
    tensors of the adapter's shapes, float32, which the coordinator keeps durably and names in its state.
    """

    slots: ClassVar[tuple[str, ...]] = ()

    def initial(self, parameters: Any, slot: str) -> float:
        """The first value of a slot."""
        return 0.0

    @abstractmethod
    def step(
        self,
        parameters: Any,
        value: FloatArray,
        combined: FloatArray,
        slots: Mapping[str, FloatArray],
        round_number: int,
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        """The next value of a tensor and of its slots.

        `parameters` is the optimizer's own part of the specification, `value` the global adapter's tensor, `combined`
        what the aggregator made of the updates; all arrays have one shape. Results MUST be finite.
        """


def rounded(values: npt.NDArray[np.float64]) -> FloatArray:
    """The values in float32; those beyond it become its largest."""
    largest = np.finfo(np.float32).max
    return np.clip(values, -largest, largest).astype(np.float32)
