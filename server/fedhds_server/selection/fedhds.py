"""FedHDS's second layer (arXiv 2410.10926, inter-client selection): rows from every group of alike centroids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import hdbscan
import numpy as np
from scipy.cluster.hierarchy import fcluster, ward
from scipy.spatial.distance import pdist

from fedhds.privacy.mechanisms import centroid_sensitivity
from fedhds.spec import ClusteringSpec, RunSpec
from fedhds.v2.selection_pb2 import ClusterReport
from fedhds_server.selection.allocation import Pool, coresets, in_proportion
from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.pca_2d import pca_2d

# The paper's: two sites that have the same group are redundancy enough.
_MIN_CLUSTER_SIZE = 2
# HDBSCAN needs more points than its core distance looks at.
_MIN_POINTS = 3


class FedHds(InterClientSelection):
    """Groups alike centroids over all sites; from each group the centroid nearest to its center gives a row.

    Without a budget the groups are the paper's, HDBSCAN's: a centroid that is like no other is dropped as noise, and
    where no two are alike each is a group by itself. With a budget the centroids form as many groups as rows are
    allowed, by Ward's linkage, so that the most similar ones merge first and one that a single site has is kept. Where
    the budget exceeds the clusters, each gives one row, and the remaining rows come from what is left in the clusters
    and outside of them, in proportion.
    """

    def check(self, spec: RunSpec, request: None, report: ClusterReport, *, rows: int) -> str:
        strategy, privacy = spec.selection.strategy, spec.privacy.selection
        assert isinstance(strategy, ClusteringSpec)
        dimension = strategy.centroid_dimension(spec)
        sizes = [report.unclustered, *(centroid.size for centroid in report.centroids)]
        if report.dimension != dimension or any(len(each.values) != dimension for each in report.centroids):
            return f"its centroids do not have the {dimension} values that the run's features give"
        if len(report.centroids) > max(rows, privacy.released_centroids):
            return "it has more clusters than rows"
        if len({centroid.cluster_id for centroid in report.centroids}) < len(report.centroids):
            return "a cluster is reported twice"
        if not all(np.isfinite(centroid.values).all() for centroid in report.centroids):
            return "a centroid holds values that are not finite"
        if not privacy.noised:
            return "" if sum(sizes) == rows else f"its clusters do not add up to the {rows} rows that it declared"
        if any(sizes):
            return "it counts rows, which the noise does not cover"
        released = privacy.released_centroids
        std = privacy.noise_multiplier * centroid_sensitivity(clip_norm=privacy.clip_norm, released=released)
        if len(report.centroids) != released or not math.isclose(report.noise_std, std, rel_tol=1e-6):
            return f"it lacks the noise that the run asks for, on exactly {released} centroids"
        return ""

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        strategy = context.spec.selection.strategy
        assert isinstance(strategy, ClusteringSpec)
        keys: list[tuple[str, int]] = []
        points: list[list[float]] = []
        pools: dict[Pool, int] = {}
        for site in sorted(reports):
            report: ClusterReport = reports[site].message
            pools[site, None] = report.unclustered
            for centroid in sorted(report.centroids, key=lambda item: item.cluster_id):
                keys.append((site, centroid.cluster_id))
                points.append(list(centroid.values))
                pools[site, centroid.cluster_id] = centroid.size
        centroids = np.array(points, dtype=np.float64).reshape(len(keys), strategy.centroid_dimension(context.spec))
        groups = _groups(keys, centroids) if context.budget is None else _ward_groups(keys, centroids, context.budget)
        counts: Counter[Pool] = Counter(winner for group in groups for winner in group.winners)
        if context.budget is not None and context.budget > len(groups):
            left = {pool: max(0, size - counts[pool]) for pool, size in pools.items()}
            counts.update(in_proportion(left, context.budget - len(groups)))
        kept = sum(len(group.members) for group in groups)
        alone = sum(len(group.members) == 1 for group in groups)
        note = (
            f"{len(keys)} clusters of {len(reports)} sites: {kept} form {len(groups)} groups, {alone} of them alone; "
            f"{len(keys) - kept} are like no other and are dropped; {counts.total()} rows are picked"
        )
        places = dict(zip(keys, pca_2d(centroids).tolist(), strict=True))
        return Selection(coresets(counts, reports), groups, (note,), places)


def _groups(keys: list[tuple[str, int]], points: np.ndarray) -> tuple[Group, ...]:
    """The paper's groups."""
    labels = np.full(len(keys), -1)
    if len(keys) >= _MIN_POINTS:
        labels = hdbscan.HDBSCAN(min_cluster_size=_MIN_CLUSTER_SIZE).fit(points).labels_
    return _with_winners(keys, points, labels if labels.max(initial=-1) >= 0 else np.arange(len(keys)))


def _ward_groups(keys: list[tuple[str, int]], points: np.ndarray, count: int) -> tuple[Group, ...]:
    """`count` groups, or as many as there are centroids."""
    if count >= len(keys):
        return _with_winners(keys, points, np.arange(len(keys)))
    return _with_winners(keys, points, fcluster(ward(pdist(points)), count, criterion="maxclust") - 1)


def _with_winners(keys: list[tuple[str, int]], points: np.ndarray, labels: np.ndarray) -> tuple[Group, ...]:
    groups = []
    for label in range(labels.max(initial=-1) + 1):
        members = np.flatnonzero(labels == label)
        distances = np.linalg.norm(points[members] - points[members].mean(axis=0), axis=1)
        # argmin takes the first of equals: the smallest (site, cluster_id).
        winner = keys[members[int(distances.argmin())]]
        groups.append(Group(tuple(keys[index] for index in members), (winner,)))
    return tuple(sorted(groups, key=lambda group: (-len(group.members), group.members)))
