"""The interface of aggregators: which tensors train in a round, and how the updates of them combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedhds.tensors.manifest import TensorSpec

FloatArray = npt.NDArray[np.float32]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Update:
    """One site's update on disk and its share of the round's weight.

    `scale` is the part of its difference to the global adapter that counts, where that is too long.
    """

    site: str
    path: Path
    share: float
    scale: float = 1.0


class Aggregator(ABC):
    """Combines updates, one group of tensors after the other.

    `parameters` is everywhere the aggregator's own part of the specification.

    Implementations MUST give the same bytes whatever the order in which updates arrive (they come sorted by site),
    MUST depend on nothing but their arguments, and MUST NOT keep more in memory than one group of all updates: a rule
    that compares all of them, such as a median, takes block after block.
    """

    description: ClassVar[str]
    """What is averaged and how, for the model card, which adds how updates are weighted."""

    def trainable(self, parameters: Any, round_number: int, roles: frozenset[str]) -> frozenset[str]:
        """Roles of the tensors that train in a round, one at least of the adapter's `roles`; the others stay."""
        return roles

    def weights(
        self, parameters: Any, updates: Sequence[Update], read: Callable[[int, TensorSpec], FloatArray]
    ) -> Shares:
        """Shares float64 (n,) of the updates, which sum to 1; `read(i, tensor)` gives the i-th update's difference,
        zeros where a tensor does not train.

        By default those that the run gives them. A rule that looks at the updates streams their tensors here.
        """
        return np.array([update.share for update in updates], dtype=np.float64)

    def groups(self, tensors: Sequence[TensorSpec]) -> list[Sequence[TensorSpec]]:
        """The tensors that train in a round, as those that combine together; by default each by itself."""
        return [(tensor,) for tensor in tensors]

    @abstractmethod
    def combine(
        self,
        parameters: Any,
        group: Sequence[TensorSpec],
        current: Sequence[FloatArray],
        shares: Shares,
        update: Callable[[int], Sequence[FloatArray]],
    ) -> Sequence[FloatArray]:
        """The combined values of a group's tensors, of the shapes of `current`; `update(i)` reads the i-th update's."""
