"""FedHDS's second layer (arXiv 2410.10926, inter-client selection): rows from every group of alike centroids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import hdbscan
import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.spatial.distance import pdist

from fedhds.v1 import federation_pb2 as pb
from fedhds_server.selection.apportion import Pool, coresets, in_proportion
from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.plane import plane

# The paper's: two sites that hold the same group are redundancy enough.
_MIN_CLUSTER_SIZE = 2
# HDBSCAN needs more points than its core distance looks at.
_FEWEST_POINTS = 3


class FedHds(InterClientSelection):
    """Groups alike centroids over all sites; from each group the centroid nearest to its centre gives a row.

    Without a budget the groups are the paper's, HDBSCAN's: a centroid that is like no other is dropped as noise, and
    where no two are alike each is a group by itself. With a budget the centroids form as
    many groups as rows are wanted, by Ward's linkage, so that the likest ones merge first and one that a single site
    has is kept. Where the budget exceeds the clusters, each gives one row, and the remaining rows come from what is
    left in the clusters and outside of them, in proportion.
    """

    needs_reports = True

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        keys: list[tuple[str, int]] = []
        points: list[list[float]] = []
        notes: list[str] = []
        # The commonest, so that no site can shut the others out by its own.
        found_in = Counter(at.clusters.dimension for _, at in sorted(reports.items()) if at.clusters.centroids)
        dimension = found_in.most_common(1)[0][0] if found_in else 0
        pools: dict[Pool, int] = {}
        for site in sorted(reports):
            clusters = reports[site].clusters
            fault = _fault(clusters, dimension, context.rows.get(site, 0), noised=context.spec.noised)
            if fault:
                notes.append(f"site {site} is left out of the selection: {fault}")
                continue
            pools[site, None] = clusters.unclustered
            for centroid in sorted(clusters.centroids, key=lambda item: item.cluster):
                keys.append((site, centroid.cluster))
                points.append(list(centroid.values))
                pools[site, centroid.cluster] = centroid.size
        found = np.array(points, dtype=np.float64).reshape(len(keys), dimension)
        groups = _groups(keys, found) if context.budget is None else _as_many_groups(keys, found, context.budget)
        counts: Counter[Pool] = Counter(winner for group in groups for winner in group.winners)
        if context.budget is not None and context.budget > len(groups):
            left = {pool: max(0, size - counts[pool]) for pool, size in pools.items()}
            counts.update(in_proportion(left, context.budget - len(groups)))
        kept = sum(len(group.members) for group in groups)
        alone = sum(len(group.members) == 1 for group in groups)
        notes.append(
            f"{len(keys)} clusters of {len(reports)} sites: {kept} form {len(groups)} groups, {alone} of them alone; "
            f"{len(keys) - kept} are like no other and are dropped; {counts.total()} rows are picked"
        )
        places = dict(zip(keys, plane(found).tolist(), strict=True))
        return Selection(coresets(counts, reports), groups, tuple(notes), places)


def _fault(clusters: pb.ClusterReport, dimension: int, rows: int, *, noised: bool) -> str:
    """Why a report on a shard of `rows` rows cannot be used; empty when it can."""
    if not rows:
        return "it declared no rows"
    if noised and (clusters.unclustered or any(centroid.size for centroid in clusters.centroids)):
        return "it counts rows, which the noise does not cover"
    if not noised and clusters.unclustered + sum(centroid.size for centroid in clusters.centroids) != rows:
        return f"its clusters do not add up to the {rows} rows that it declared"
    if any(len(centroid.values) != clusters.dimension for centroid in clusters.centroids):
        return "a centroid has another number of values than the report says"
    if clusters.centroids and clusters.dimension != dimension:
        return f"its centroids have {clusters.dimension} values, those of other sites {dimension}"
    if len({centroid.cluster for centroid in clusters.centroids}) < len(clusters.centroids):
        return "a cluster is reported twice"
    if not all(np.isfinite(centroid.values).all() for centroid in clusters.centroids):
        return "a centroid holds values that are not finite"
    return ""


def _groups(keys: list[tuple[str, int]], points: np.ndarray) -> tuple[Group, ...]:
    """The paper's groups."""
    labels = np.full(len(keys), -1)
    if len(keys) >= _FEWEST_POINTS:
        labels = hdbscan.HDBSCAN(min_cluster_size=_MIN_CLUSTER_SIZE).fit(points).labels_
    return _with_winners(keys, points, labels if labels.max(initial=-1) >= 0 else np.arange(len(keys)))


def _as_many_groups(keys: list[tuple[str, int]], points: np.ndarray, wanted: int) -> tuple[Group, ...]:
    """`wanted` groups, or as many as there are centroids."""
    if wanted >= len(keys):
        return _with_winners(keys, points, np.arange(len(keys)))
    return _with_winners(keys, points, fcluster(ward(pdist(points)), wanted, criterion="maxclust") - 1)


def _with_winners(keys: list[tuple[str, int]], points: np.ndarray, labels: np.ndarray) -> tuple[Group, ...]:
    groups = []
    for label in range(labels.max(initial=-1) + 1):
        members = np.flatnonzero(labels == label)
        distances = np.linalg.norm(points[members] - points[members].mean(axis=0), axis=1)
        # argmin takes the first of equals: the smallest (site, cluster).
        winner = keys[members[int(distances.argmin())]]
        groups.append(Group(tuple(keys[index] for index in members), (winner,)))
    return tuple(sorted(groups, key=lambda group: (-len(group.members), group.members)))
