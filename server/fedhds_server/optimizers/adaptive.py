"""FedAdagrad, FedYogi and FedAdam (Reddi et al. 2021, "Adaptive Federated Optimization", Alg. 2)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedhds.spec import AdagradSpec, AdamSpec, YogiSpec
from fedhds_server.optimizers.base import FloatArray, ServerOptimizer, rounded

Doubles = npt.NDArray[np.float64]


class Adaptive(ServerOptimizer):
    """m <- beta1 m + (1 - beta1) delta; v by the rule; value <- value + learning rate * m / (sqrt(v) + tau).

    delta is combined - value. v starts at tau squared, m at 0; nothing corrects their bias, as in the paper.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum", "squares")

    def initial(self, parameters: Any, slot: str) -> float:
        """Tau squared for v, 0 for m."""
        return float(parameters.tau) ** 2 if slot == "squares" else 0.0

    def step(
        self,
        parameters: Any,
        value: FloatArray,
        combined: FloatArray,
        slots: Mapping[str, FloatArray],
        round_number: int,
    ) -> tuple[FloatArray, Mapping[str, FloatArray]]:
        # In float64, each result rounded once.
        delta = combined.astype(np.float64)
        delta -= value
        squares = self.squares(parameters, slots["squares"], np.square(delta))
        mean = self.mean(parameters, slots, delta)
        new = {name: rounded({"squares": squares, "momentum": mean}[name]) for name in self.slots}
        np.sqrt(squares, out=squares)
        squares += parameters.tau
        mean *= parameters.learning_rate
        mean /= squares
        mean += value
        return rounded(mean), new

    def mean(self, parameters: Any, slots: Mapping[str, FloatArray], delta: Doubles) -> Doubles:
        """The next m; may change `delta`."""
        delta *= 1 - parameters.beta1
        before = slots["momentum"].astype(np.float64)
        before *= parameters.beta1
        delta += before
        return delta

    @abstractmethod
    def squares(self, parameters: Any, before: FloatArray, square: Doubles) -> Doubles:
        """The next v, from the one before and the square of delta, which it may change."""


class Adagrad(Adaptive):
    """v <- v + delta squared; without m, as in the paper's experiments."""

    slots = ("squares",)

    def mean(self, parameters: AdagradSpec, slots: Mapping[str, FloatArray], delta: Doubles) -> Doubles:
        """Delta itself."""
        return delta

    def squares(self, parameters: AdagradSpec, before: FloatArray, square: Doubles) -> Doubles:
        """Their sum."""
        square += before
        return square


class Yogi(Adaptive):
    """v <- v - (1 - beta2) delta squared * sign(v - delta squared)."""

    def squares(self, parameters: YogiSpec, before: FloatArray, square: Doubles) -> Doubles:
        """A step towards the square whose size is the square's, not the difference's."""
        sign = np.sign(before - square)
        square *= -(1 - parameters.beta2)
        square *= sign
        square += before
        return square


class Adam(Adaptive):
    """v <- beta2 v + (1 - beta2) delta squared."""

    def squares(self, parameters: AdamSpec, before: FloatArray, square: Doubles) -> Doubles:
        """Their running mean."""
        square *= 1 - parameters.beta2
        share = before.astype(np.float64)
        share *= parameters.beta2
        square += share
        return square
