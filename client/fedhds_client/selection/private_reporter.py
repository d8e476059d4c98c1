"""The gate through which a site's selection reports leave: its own budget, and the ledger, before anything is sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.privacy.accountant import Cost

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds.privacy.ledger import Account, Limit, Unit
    from fedhds.spec import RunSpec

logger = logging.getLogger(__name__)

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
    account: Account
    """The ledger's view of the site's rows."""
    run_id: str
    spec: RunSpec
    limits: Sequence[Limit] = ()
    """The site's own limits on epsilon, which hold in each privacy unit."""
    allow_exact_kmeans_sums: bool = False
    """Whether the site agreed to release sums over clusters without noise."""
    min_cluster_rows: int = MIN_CLUSTER_ROWS
    """Fewest rows of a cluster whose centroid is released."""
    kind: type[Message] | None = None
    """The message that is released, where it is not the report of the run's strategy."""
    own_unit: Unit | None = None
    """Its privacy unit, where that is not the strategy's."""

    @property
    def unit(self) -> Unit:
        """The privacy unit of what is released."""
        return self.own_unit or self.spec.selection.strategy.privacy_unit or "client"

    @property
    def hides_rows(self) -> bool:
        """Whether the run's noise is strong enough to hide what a sum over a single row says."""
        return self.spec.privacy.selection.noise_multiplier >= MIN_NOISE_MULTIPLIER

    def earlier(self, task_id: str) -> Message | None:
        """What this task released before, to be sent again as it was; raises StorageError, PrivacyError."""
        payload = self.account.release(self.run_id, task_id)
        kind = self.kind or self.spec.selection.strategy.report_type
        return None if payload is None or kind is None else kind.FromString(payload)

    def check_budget(self) -> None:
        """Raises PrivacyError when the site's budget forbids one more release in this run."""
        cost = Cost(self.spec.privacy.selection.noise_multiplier)
        self.account.check(cost, unit=self.unit, limits=self.limits)

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
        privacy = self.spec.privacy.selection
        entry = self.account.record(
            report.SerializeToString(),
            run_id=self.run_id,
            task_id=task_id,
            cost=Cost(privacy.noise_multiplier),
            sensitivity=sensitivity,
            clip_norm=privacy.clip_norm,
            released=released,
            dimension=dimension,
            delta=privacy.delta,
            release=release,
            unit=self.unit,
            limits=self.limits,
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
                self.account.spent(self.run_id, delta=privacy.delta, unit=self.unit),
            )
