"""The interface of metrics, and sums that combine by addition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from fedhds_client.data.row_formats import Row


@dataclass(frozen=True, slots=True)
class EvaluatedBatch:
    """What is known of some rows once a model has read and answered them."""

    rows: Sequence[Row]
    answers: Sequence[str]
    """Greedy answers, in the order of `rows`; empty where none were generated."""
    loss_sum: float
    """Negative log-likelihood of the rows' responses, summed over their tokens, in nats."""
    tokens: int
    """Tokens of the rows' responses."""
    answer_tokens: Sequence[int] = ()
    """Tokens of each answer."""


class Metric(ABC):
    """A mean over rows, over tokens or over what else the metric counts."""

    needs_answers: ClassVar[bool] = True
    """Whether it is left out where no answers are generated."""

    @abstractmethod
    def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
        """The sum of the metric's values over the batch, and what to divide it by for the mean; both add up."""


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """Sums over rows; they combine by +, in any order."""

    rows: int = 0
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By metric: sum of values, weight."""

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        names = sorted({*self.metrics, *other.metrics})
        both = [[sums.metrics.get(name, (0.0, 0.0)) for sums in (self, other)] for name in names]
        added = {name: (a[0] + b[0], a[1] + b[1]) for name, (a, b) in zip(names, both, strict=True)}
        return EvaluationSums(self.rows + other.rows, added)

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric; of nothing it is 0."""
        return {name: total / weight if weight else 0.0 for name, (total, weight) in self.metrics.items()}
