"""Which rows train: the strategy, how many rows, how often they are selected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import Budget, budget_rows
from fedhds.spec.features import FeatureSpec
from fedhds.spec.filters import FILTER_SPECS, Filters, Share
from fedhds.spec.strategies import STRATEGIES, StrategySpec

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec

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
    filters: Filters = parameter(
        "",
        "Filters that rows must pass before the strategy sees them, one after the other, divided by commas. alignment: "
        "rows whose answers fit their prompts; length: no very short or long answers; duplicates: no rows that are "
        "much like another one of the same site. Each has one threshold for all sites.",
        setting="selection_filters",
    )
    filter_keep: Share = parameter("70%", "Share of the rows that each filter keeps.")
    features: FeatureSpec = Field(default_factory=FeatureSpec)

    @property
    def filter_names(self) -> tuple[str, ...]:
        """The filters, in order."""
        return tuple(self.filters.split(",")) if self.filters else ()

    @property
    def asks_sites(self) -> bool:
        """Whether sites must report before rows can be selected."""
        return bool(self.filters) or self.strategy.report_type is not None

    def releases(self, spec: RunSpec) -> int:
        """How many releases of a site one selection makes, in its privacy unit."""
        return len(self.filter_names) + self.strategy.releases(spec)

    @property
    def released(self) -> str:
        """What a site sends for selection, for the model card; empty: nothing."""
        counts = "counts of rows by the scores of filters" if self.filters else ""
        return " and ".join(filter(None, (self.strategy.released, counts)))

    def privacy_note(self, spec: RunSpec) -> str:
        """The model card's sentences about clipping and noise; empty where nothing is released."""
        notes = [self.strategy.privacy_note(spec)]
        if self.filters:
            privacy = spec.privacy.selection
            noise = f"Gaussian noise of multiplier {privacy.noise_multiplier:.4g}" if privacy.noised else "no noise"
            notes.append(f"Counts of rows by the scores of the filters {', '.join(self.filter_names)} had {noise}.")
        return " ".join(filter(None, notes))

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", when settings do not fit each other."""
        self.strategy.check(spec)
        if not self.filters or not spec.privacy.noised:
            return
        unbounded = next((name for name in self.filter_names if not FILTER_SPECS[name].of_one_row), None)
        if unbounded:
            raise ValueError(
                f"selection_filters: with {unbounded} one row decides for many others, so noise would hide nothing; "
                f"drop the filter {unbounded}, or all noise"
            )
        if not spec.privacy.selection.noised:
            raise ValueError(
                "selection_noise_multiplier: filters without noise tell of rows what DP-SGD is to hide; set it above 0"
            )
        if self.strategy.privacy_unit == "client":
            raise ValueError(
                f"selection_filters: with noise a filter hides single rows, but {self.strategy.name} whole shards, and "
                "the two do not add up; choose federated-kmeans or random, or drop the filters or the noise"
            )

    @property
    def one_shot(self) -> bool:
        """Whether rows are selected once, before the first round."""
        return self.schedule == "one-shot"

    def budget_of(self, pool: int) -> int | None:
        """Rows to train on of `pool` rows; None where the strategy sets it itself."""
        return self.strategy.auto_budget(pool) if self.budget == "auto" else budget_rows(self.budget, pool)
