"""Which rows train: the strategy, how many rows, how often they are selected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import Budget, budget_rows
from fedhds.spec.features import FeatureSpec
from fedhds.spec.strategies import STRATEGIES, StrategySpec

Schedule = Literal["one-shot", "per-round"]


class SelectionSpec(Parameters):
    """Selection of the coreset."""

    strategy: Annotated[StrategySpec, STRATEGIES] = Field(default_factory=STRATEGIES.make_default)
    schedule: Schedule = parameter(
        "one-shot",
        "Select once before the first round, or again in each round for its cohort.",
        setting="selection_schedule",
    )
    budget: Budget = parameter(
        "auto",
        "Rows to train on, of all enrolled sites' rows (per-round: of the cohort's): a count, a share such as 1.5%, or "
        "auto. auto means 1.5%, except for full, which takes all rows, and for fedhds: one row of each group that the "
        "paper's rule forms, which may be very few. The budget is met exactly; under noise it is an upper bound.",
        setting="selection_budget",
    )
    features: FeatureSpec = Field(default_factory=FeatureSpec)

    @property
    def one_shot(self) -> bool:
        """Whether rows are selected once, before the first round."""
        return self.schedule == "one-shot"

    def budget_of(self, pool: int) -> int | None:
        """Rows to train on of `pool` rows; None where the strategy sets it itself."""
        return self.strategy.auto_budget(pool) if self.budget == "auto" else budget_rows(self.budget, pool)
