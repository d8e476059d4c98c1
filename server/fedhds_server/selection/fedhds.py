"""FedHDS's second layer (arXiv 2410.10926, inter-client selection): one centroid per group of alike centroids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import hdbscan
import numpy as np

from fedhds.v1 import federation_pb2 as pb
from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext

# The paper's: two sites that hold the same group are redundancy enough.
_MIN_CLUSTER_SIZE = 2
# HDBSCAN needs more points than its core distance looks at.
_FEWEST_POINTS = 3


class FedHds(InterClientSelection):
    """HDBSCAN over all centroids; from each group the centroid nearest to its centre wins and gives one row.

    As in the paper a centroid that is like no other is dropped (it is `noise` to HDBSCAN), and every site's centroids
    live in a frame of their own. Where no two centroids are alike nothing is redundant: then each is a group by itself.
    """

    needs_reports = True

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        keys: list[tuple[str, int]] = []
        points: list[list[float]] = []
        notes: list[str] = []
        dimension = 0
        for site in sorted(reports):
            clusters = reports[site].clusters
            dimension = dimension or clusters.dimension
            fault = _fault(clusters, dimension)
            if fault or site not in context.rows:
                notes.append(f"site {site} is left out of the selection: {fault or 'it declared no rows'}")
                continue
            for centroid in sorted(clusters.centroids, key=lambda item: item.cluster):
                keys.append((site, centroid.cluster))
                points.append(list(centroid.values))
        groups = _groups(keys, np.array(points, dtype=np.float64).reshape(len(keys), dimension))
        picks: dict[str, list[pb.ClusterPick]] = defaultdict(list)
        for group in groups:
            for site, cluster in group.winners:
                picks[site].append(pb.ClusterPick(cluster=cluster, count=1))
        coresets = {
            site: pb.Coreset(
                picks=pb.ClusterPicks(
                    select_task_id=reports[site].select_task_id,
                    clusters=sorted(chosen, key=lambda pick: pick.cluster)[: context.rows[site]],
                )
            )
            for site, chosen in sorted(picks.items())
        }
        merged = sum(len(group.members) for group in groups)
        notes.append(
            f"{len(keys)} clusters of {len(reports)} sites: {merged} form {len(groups)} groups, "
            f"{len(keys) - merged} are like no other and are dropped"
        )
        return Selection(coresets, groups, tuple(notes))


def _fault(clusters: pb.ClusterReport, dimension: int) -> str:
    """Why a report cannot be used; empty when it can."""
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
    alone = tuple(Group((key,), (key,)) for key in keys)
    if len(keys) < _FEWEST_POINTS:
        return alone
    labels = hdbscan.HDBSCAN(min_cluster_size=_MIN_CLUSTER_SIZE).fit(points).labels_
    if labels.max() < 0:
        return alone
    groups = []
    for label in range(labels.max() + 1):
        members = np.flatnonzero(labels == label)
        distances = np.linalg.norm(points[members] - points[members].mean(axis=0), axis=1)
        # argmin takes the first of equals: the smallest (site, cluster).
        winner = keys[members[int(distances.argmin())]]
        groups.append(Group(tuple(keys[index] for index in members), (winner,)))
    return tuple(groups)
