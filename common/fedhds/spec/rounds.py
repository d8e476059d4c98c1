"""How many rounds, with which sites, and when each closes."""

from __future__ import annotations

import math

from fedhds.settings import Parameters, parameter
from fedhds.spec.amounts import MAX_COUNT, MAX_ROUNDS, Quorum, budget_rows


class RoundsSpec(Parameters):
    """Rounds and cohorts."""

    count: int = parameter(..., "Number of aggregation rounds.", setting="rounds", ge=1, le=MAX_ROUNDS)
    cohort_fraction: float = parameter(
        1.0,
        "Share of the enrolled training sites drawn into each round (at least one). Here and below, all sites of one "
        "certificate count as one.",
        gt=0,
        le=1,
    )
    min_sites: int = parameter(2, "Training sites that must be enrolled before the run starts.", ge=1, le=MAX_COUNT)
    min_evaluators: int = parameter(0, "Evaluators that must be enrolled before the run starts.", ge=0, le=MAX_COUNT)
    quorum: Quorum = parameter(
        "1",
        "Fewest replies of a cohort with which a selection or a round can close: a count or a share such as 80%. With "
        "fewer it always waits.",
    )
    deadline: float = parameter(
        0.0,
        "Seconds after which a selection or a round closes with its quorum, without the sites that still work; 0: it "
        "waits for all sites that send heartbeats. The time starts again when the coordinator restarts.",
        ge=0,
    )
    over_selection: float = parameter(
        0.0,
        "Draw this many more sites into a round, as a share of its cohort. The round closes with as many updates as "
        "the cohort has without them.",
        ge=0,
        le=10,
    )
    heartbeat_timeout: float = parameter(
        60.0, "Seconds without a heartbeat after which a site counts as disconnected.", gt=0
    )
    task_timeout: float = parameter(
        3600.0,
        "Seconds without progress, one percent of a task, after which a site's tasks count as failed although it sends "
        "heartbeats; evaluations, too. For as long a site may stand still while it takes the final adapter. A "
        "reduction by t-SNE or UMAP is one step: 100,000 rows may take half an hour.",
        gt=0,
    )

    @property
    def smallest_cohort(self) -> int:
        """Parties in the cohort of a run that starts with as few as it may."""
        return self.cohort_of(self.min_sites)

    def cohort_of(self, count: int) -> int:
        """Parties in a cohort out of `count` (at least one): max(1, round(fraction * count))."""
        return min(count, max(1, math.floor(self.cohort_fraction * count + 0.5)))

    def quorum_of(self, cohort: int) -> int:
        """Fewest replies that close a selection or round of `cohort` sites."""
        if self.quorum.endswith("%"):
            return max(1, budget_rows(self.quorum, cohort) or 0)
        return int(self.quorum)
