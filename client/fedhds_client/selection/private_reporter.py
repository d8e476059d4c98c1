"""The gate through which a site's selection reports leave: its own budget, and the ledger, before anything is sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds.privacy.ledger import Ledger, Unit
    from fedhds.spec import RunSpec

logger = logging.getLogger(__name__)

# The run's delta comes from the coordinator, and a large one would make every epsilon small; so the site judges its
# budget at this delta or at the run's, whichever is smaller.
MAX_DELTA = 1e-5
# Fewest rows behind what a site says of its rows, unless its people choose otherwise.
MIN_CLUSTER_ROWS = 5
# Weaker noise hides no row, and counts as none. At this multiplier, the noise on a sum of features of norm 1 in the
# default 256 dimensions is twice as long as one row's features (0.1 * sqrt(2) * 16).
MIN_NOISE_MULTIPLIER = 0.1


@dataclass(frozen=True)
class PrivateReporter:
    """Where a site's releases in one run are allowed and recorded."""

    site: str
    """Name, for the log."""
    folder: Path
    """The site's state folder."""
    ledger: Ledger
    run_id: str
    spec: RunSpec
    max_epsilon: float | None
    """The site's own limit on epsilon over all runs, in each privacy unit; None: no limit."""
    allow_exact_kmeans_sums: bool = False
    """Whether the site agreed to release sums over clusters without noise."""
    min_cluster_rows: int = MIN_CLUSTER_ROWS
    """Fewest rows of a cluster whose centroid is released."""

    @property
    def unit(self) -> Unit:
        """The privacy unit of what the run's strategy releases."""
        return self.spec.selection.strategy.privacy_unit or "client"

    @property
    def hides_rows(self) -> bool:
        """Whether the run's noise is strong enough to hide what a sum over a single row says."""
        return self.spec.privacy.selection.noise_multiplier >= MIN_NOISE_MULTIPLIER

    def earlier(self, task_id: str) -> Message | None:
        """What this task released before, to be sent again as it was; raises StorageError."""
        payload, kind = self.ledger.release(self.run_id, task_id), self.spec.selection.strategy.report_type
        return None if payload is None or kind is None else kind.FromString(payload)

    def check_budget(self) -> None:
        """Raises PrivacyError when the site's budget forbids one more release in this run."""
        privacy = self.spec.privacy.selection
        self.ledger.check(
            max_epsilon=self.max_epsilon,
            noise_multiplier=privacy.noise_multiplier,
            delta=min(privacy.delta, MAX_DELTA),
            unit=self.unit,
        )

    def record(
        self,
        task_id: str,
        report: Message,
        *,
        release: str,
        sensitivity: float | None,
        released: int,
        dimension: int,
        log_level: int = logging.INFO,
    ) -> None:
        """Makes a report and its ledger entry durable; only then may it be sent.

        `release` names what is released, `released` counts it; `sensitivity` is its L2 sensitivity in the strategy's
        privacy unit, None if it is not bounded. Raises PrivacyError when the budget forbids the release or the task
        has released before, StorageError.
        """
        self.check_budget()
        privacy = self.spec.privacy.selection
        entry = self.ledger.record(
            report.SerializeToString(),
            run_id=self.run_id,
            task_id=task_id,
            noise_multiplier=privacy.noise_multiplier,
            sensitivity=sensitivity,
            clip_norm=privacy.clip_norm,
            released=released,
            dimension=dimension,
            delta=privacy.delta,
            release=release,
            unit=self.unit,
        )
        if entry.epsilon is None:
            text = "%s: releases %d %s without noise, so without a guarantee"
            logger.log(log_level, text, self.site, released, release)
        else:
            logger.log(
                log_level,
                "%s: releases %d noised %s at %s-level epsilon %.4g (delta %g), this run so far %.4g",
                self.site,
                released,
                release,
                self.unit,
                entry.epsilon,
                privacy.delta,
                self.ledger.spent(self.run_id, delta=privacy.delta, unit=self.unit),
            )
