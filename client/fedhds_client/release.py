"""The release of a site's centroids: the site's own budget, clipping, noise and ledger, before anything is sent."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedhds.errors import PrivacyError
from fedhds.lloyd import UNIT
from fedhds.privacy.mechanisms import (
    cell_sensitivity,
    centroid_sensitivity,
    clip,
    noised_cells,
    noised_centroids,
    site_rng,
)
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.coreset import save_clusters

if TYPE_CHECKING:
    from fedhds.privacy.ledger import Ledger, Unit
    from fedhds.runspec import RunSpec
    from fedhds_client.cells import Cells
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
    """The site's own limit on epsilon over all runs, in each privacy unit; None: no limit."""
    share_exact_cells: bool = False
    """Whether the site agreed to release cells without noise."""

    @property
    def unit(self) -> Unit:
        """The privacy unit of what the run's strategy releases."""
        return "example" if self.spec.strategy == "global" else "client"

    def earlier(self, task_id: str) -> pb.ClusterReport | pb.CellReport | None:
        """What this task released before, to be sent again as it was; raises StorageError."""
        payload = self.ledger.release(self.run_id, task_id)
        kind = pb.CellReport if self.spec.strategy == "global" else pb.ClusterReport
        return None if payload is None else kind.FromString(payload)

    def check(self) -> None:
        """Raises PrivacyError when the site's own policy or budget forbids one more release in this run."""
        spec = self.spec
        if spec.strategy == "global" and not spec.noised and not self.share_exact_cells:
            raise PrivacyError(
                "the strategy global without noise sends sums that may be over a single row, and this site has not "
                "agreed to that: start it with --share-exact-cells, or the run with noise"
            )
        self.ledger.check(
            max_epsilon=self.max_epsilon,
            noise_multiplier=spec.noise_multiplier,
            delta=min(spec.delta, LARGEST_DELTA),
            unit=self.unit,
        )

    def release_cells(self, task_id: str, cells: Cells, *, rows: int, last: bool) -> pb.CellReport:
        """The report on `cells`, durable like that on clusters; in the `last` pass their members are kept, too.

        Unit with noise: one row, left out; every cell is reported, with `cell_sensitivity`, and no distance. The
        noise composes over passes. Without noise the cells that have rows are reported exactly, and in the last pass
        the squared distance of the nearest row of each. Raises as `release_clusters` does.
        """
        self.check()
        spec = self.spec
        sums, counts = cells.sums, cells.counts
        report = pb.CellReport(dimension=sums.shape[1])
        sensitivity = None
        if spec.noised:
            sensitivity = cell_sensitivity(clip_norm=spec.clip_norm)
            report.noise_std = spec.noise_multiplier * sensitivity
            noised, noised_counts = noised_cells(
                sums / UNIT, counts, clip_norm=spec.clip_norm, noise_multiplier=spec.noise_multiplier, rng=site_rng()
            )
            sums, counts = np.rint(noised * UNIT).astype(np.int64), np.rint(noised_counts).astype(np.int64)
        # Sorted by centre, then by distance: the first row of a centre is its nearest.
        order = np.lexsort((cells.squares, cells.labels))
        firsts = order[np.searchsorted(cells.labels[order], np.arange(len(counts))) % max(1, len(order))]
        for centre, count in enumerate(counts.tolist()):
            if not spec.noised and not count:
                continue
            cell = report.cells.add(centre=centre, count=count, sums=sums[centre].tolist())
            if last and not spec.noised:
                cell.nearest = cells.squares[firsts[centre]]
        if last:
            members = cells.members(spread=spec.noised)
            save_clusters(self.folder, self.run_id, task_id, members, rows=rows)
        # One line for the whole selection: it has a dozen passes.
        level = logging.INFO if last else logging.DEBUG
        self._record(task_id, report, sensitivity=sensitivity, released=len(report.cells), release="cells", level=level)
        return report

    def release_clusters(self, task_id: str, clusters: Clusters, *, rows: int) -> pb.ClusterReport:
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
        self._record(task_id, report, sensitivity=sensitivity, released=len(members), release="centroids")
        return report

    def _record(
        self,
        task_id: str,
        report: pb.ClusterReport | pb.CellReport,
        *,
        sensitivity: float | None,
        released: int,
        release: Literal["centroids", "cells"],
        level: int = logging.INFO,
    ) -> None:
        spec = self.spec
        entry = self.ledger.record(
            report.SerializeToString(),
            run_id=self.run_id,
            task_id=task_id,
            noise_multiplier=spec.noise_multiplier,
            sensitivity=sensitivity,
            clip_norm=spec.clip_norm,
            released=released,
            dimension=report.dimension,
            delta=spec.delta,
            release=release,
            unit=self.unit,
        )
        if entry.epsilon is None:
            text = "%s: releases %d %s without noise, so without a guarantee"
            logger.log(level, text, self.site, released, release)
        else:
            logger.log(
                level,
                "%s: releases %d noised %s at %s-level epsilon %.4g (delta %g), this run so far %.4g",
                self.site,
                released,
                release,
                self.unit,
                entry.epsilon,
                spec.delta,
                self.ledger.spent(self.run_id, delta=spec.delta, unit=self.unit),
            )
