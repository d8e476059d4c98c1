"""The release of a site's centroids: the site's own budget, clipping, noise and ledger, before anything is sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.privacy.mechanisms import centroid_sensitivity, clip, noised_centroids, site_rng
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.coreset import save_clusters

if TYPE_CHECKING:
    from fedhds.privacy.ledger import Ledger
    from fedhds.runspec import RunSpec
    from fedhds_client.clustering import Clusters

logger = logging.getLogger(__name__)

# The run's delta comes from the coordinator, and a large one would make every epsilon small; so the site judges its
# budget at this delta or at the run's, whichever is smaller.
LARGEST_DELTA = 1e-5


@dataclass(frozen=True)
class Releases:
    """Where a site's releases in one run are allowed, noised and kept."""

    site: str
    """Name, for the log."""
    folder: Path
    """The site's state folder."""
    ledger: Ledger
    run_id: str
    spec: RunSpec
    max_epsilon: float | None
    """The site's own limit on client-level epsilon over all runs; None: no limit."""

    def earlier(self, task_id: str) -> pb.ClusterReport | None:
        """What this task released before, to be sent again as it was; raises StorageError."""
        payload = self.ledger.release(self.run_id, task_id)
        return None if payload is None else pb.ClusterReport.FromString(payload)

    def check(self) -> None:
        """Raises PrivacyError when the site's own budget forbids one more release in this run."""
        delta = min(self.spec.delta, LARGEST_DELTA)
        self.ledger.check(max_epsilon=self.max_epsilon, noise_multiplier=self.spec.noise_multiplier, delta=delta)

    def release(self, task_id: str, clusters: Clusters, *, rows: int) -> pb.ClusterReport:
        """The report on `clusters`; its members, its bytes and its ledger entry are durable when it is returned.

        Unit: the client, under replacement of its whole shard. With noise, exactly `released_centroids` are reported,
        the largest clusters first: others stay at home, padding has no members, and no count leaves. Sensitivity:
        `centroid_sensitivity`. Without noise there is no guarantee, and the entry says so. It lapses also when one
        task is drawn twice, so ask `earlier` first. Raises PrivacyError when the budget forbids the release or the
        task has released, StorageError.
        """
        self.check()
        spec = self.spec
        members, values, sensitivity = clusters.members, clusters.centroids, None
        unclustered = clusters.unclustered
        if spec.noised:
            unclustered = ()
            members = (*members, *[()] * spec.released_centroids)[: spec.released_centroids]
            values = noised_centroids(
                values,
                clip_norm=spec.clip_norm,
                noise_multiplier=spec.noise_multiplier,
                released=spec.released_centroids,
                rng=site_rng(),
            )
        elif spec.clip_norm:
            values = clip(values, spec.clip_norm)
        if spec.clip_norm:
            sensitivity = centroid_sensitivity(clip_norm=spec.clip_norm, released=len(members))
        report = pb.ClusterReport(
            dimension=values.shape[1],
            centroids=[
                pb.Centroid(cluster=number, values=row, size=0 if spec.noised else len(members[number]))
                for number, row in enumerate(values)
            ],
            unclustered=len(unclustered),
            clip_norm=spec.clip_norm,
            noise_std=spec.noise_multiplier * (sensitivity or 0.0),
        )
        save_clusters(self.folder, self.run_id, task_id, members, unclustered=unclustered, rows=rows)
        entry = self.ledger.record(
            report.SerializeToString(),
            run_id=self.run_id,
            task_id=task_id,
            noise_multiplier=spec.noise_multiplier,
            sensitivity=sensitivity,
            clip_norm=spec.clip_norm,
            released=len(members),
            dimension=report.dimension,
            delta=spec.delta,
        )
        if entry.epsilon is None:
            logger.info("%s: releases %d centroids without noise, so without a guarantee", self.site, len(members))
        else:
            logger.info(
                "%s: releases %d noised centroids at client-level epsilon %.4g (delta %g), this run so far %.4g",
                self.site,
                len(members),
                entry.epsilon,
                spec.delta,
                self.ledger.spent(self.run_id, delta=spec.delta),
            )
        return report
