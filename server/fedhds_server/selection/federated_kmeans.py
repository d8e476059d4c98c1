"""Federated k-means: Lloyd's algorithm over all sites' rows from sums and counts alone, then rows of every cluster.

Sums and counts per cluster are all that Lloyd's algorithm needs of the rows, so without noise this is k-means on the
pooled rows, without moving them. Centers start from the mean of all rows and split (Linde, Buzo & Gray 1980, "An
Algorithm for Vector Quantizer Design", III), those with the most distortion first: as all rows have one known norm, it
follows from sums and counts as well. Surplus centers are then merged by Ward's linkage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhds.kmeans import OVERSPLIT, SUM_UNIT, splitting_passes
from fedhds.spec import FederatedKMeansSpec, RunSpec
from fedhds.v2.selection_pb2 import ClusterStats, KMeansCenters, KMeansStats
from fedhds_server.selection.allocation import Allocation, Pool, coresets, group_shares
from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.kmeans_stats import added, fault_of, without_sums
from fedhds_server.selection.pca_2d import pca_2d
from fedhds_server.selection.ward import ward_labels

FloatArray = npt.NDArray[np.float64]

# Halves of a split cluster part along a hyperplane through its mean, whatever this length is; features have norm 1.
_NUDGE = 1e-3


@dataclass(frozen=True, slots=True)
class Clusters:
    """Clusters with rows, by number of their center: counts (m,), means (m, d) and distortions (m,)."""

    numbers: npt.NDArray[np.int64]
    counts: FloatArray
    means: FloatArray
    distortions: FloatArray
    """Sums of the rows' squared distances from the mean."""

    @classmethod
    def of(cls, stats: KMeansStats, *, norm: float) -> Clusters:
        """The clusters that have rows, all of norm `norm`; under noise those whose count exceeds the noise."""
        kept = [cluster for cluster in stats.clusters if cluster.count > max(0.0, stats.noise_std)]
        counts = np.array([cluster.count for cluster in kept], dtype=np.float64)
        sums = np.array([cluster.sums for cluster in kept], dtype=np.float64).reshape(len(kept), stats.dimension)
        means = sums / SUM_UNIT / counts[:, None]
        distortions = counts * np.maximum(0.0, norm**2 - (means**2).sum(axis=1))
        return cls(np.array([cluster.cluster_id for cluster in kept], dtype=np.int64), counts, means, distortions)


class FederatedKMeans(InterClientSelection):
    """As many centers as rows are allowed, over all sites' rows; the row nearest to each trains.

    Without noise the winner of a cluster is the nearest of all rows (of equally near ones that of the first site by
    `SelectionContext.rank`, then the first row) whose party has not got its part of the budget. Clusters that stay
    without a winner, and a budget beyond the clusters, are made up for by the next nearest rows, in proportion to the
    rows of the clusters at each site. Under noise there are `released_centroids` centers, no
    distances, and the budget is divided by noised counts; each site then picks rows of its clusters that are far apart.
    """

    def check(self, spec: RunSpec, request: KMeansCenters | None, report: KMeansStats, *, rows: int) -> str:
        return fault_of(report, spec, centers=request, rows=rows)

    def add(self, totals: KMeansStats | None, report: KMeansStats) -> tuple[KMeansStats, KMeansStats]:
        # What is kept does not grow with the sites, and integers add up in any order.
        return added(totals or KMeansStats(), report), without_sums(report)

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | KMeansCenters:
        spec, strategy = context.spec, context.spec.selection.strategy
        assert isinstance(strategy, FederatedKMeansSpec)
        centers: KMeansCenters | None = context.request
        privacy = spec.privacy.selection
        if centers is not None:
            target = centers.target_count
        else:
            wanted = max(1, context.budget or 1)
            target = privacy.released_centroids if privacy.noised else min(strategy.groups or wanted, wanted)
        if centers is not None and centers.last:
            return _picks(context, centers, reports)
        clusters = Clusters.of(context.totals or KMeansStats(dimension=1), norm=min(1.0, privacy.clip_norm or 1.0))
        if not len(clusters.counts):
            return Selection({}, notes=("no site has rows to take centers from",))
        splitting = splitting_passes(target)
        done = context.step + 1
        if done < splitting:
            values = split(clusters, min(2**done, OVERSPLIT * target), seed=spec.seed)
        elif done == splitting:
            values = merge(clusters, target)
        else:
            values = split(clusters, target, seed=spec.seed)
        return KMeansCenters(
            dimension=spec.selection.features.dimension,
            values=values.astype(np.float32).ravel(),
            last=done == splitting + strategy.kmeans_iterations,
            target_count=target,
        )


def split(clusters: Clusters, target: int, *, seed: int) -> FloatArray:
    """The means, those with the most distortion in two until there are `target` (each at most once)."""
    order = np.lexsort((clusters.numbers, -clusters.distortions))
    coarsest = order[: max(0, target - len(clusters.counts))]
    pairs = [_nudge(clusters, index, seed) for index in sorted(coarsest.tolist())]
    kept = np.delete(clusters.means, coarsest, axis=0)
    return np.concatenate([kept, *pairs]) if pairs else kept


def _nudge(clusters: Clusters, index: int, seed: int) -> FloatArray:
    name = f"fedhds split/{seed}/{len(clusters.counts)}/{clusters.numbers[index]}"
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    direction = np.random.default_rng(key).standard_normal(clusters.means.shape[1])
    step = _NUDGE * direction / np.linalg.norm(direction)
    return np.stack([clusters.means[index] - step, clusters.means[index] + step])


def merge(clusters: Clusters, target: int) -> FloatArray:
    """`target` centers out of more: the two whose union adds least to the rows' squared distances, again and again."""
    labels = ward_labels(clusters.means, clusters.counts, target)
    counts = np.bincount(labels, weights=clusters.counts)
    means = np.zeros((len(counts), clusters.means.shape[1]))
    np.add.at(means, labels, clusters.means * clusters.counts[:, None])
    return means / counts[:, None]


def _picks(context: SelectionContext, centers: KMeansCenters, reports: Mapping[str, Report]) -> Selection:
    """The rows, once the centers are final."""
    budget = context.budget or 0
    at: dict[int, dict[str, ClusterStats]] = {}
    for site in sorted(reports):
        for cluster in reports[site].message.clusters:
            if cluster.count > 0:
                at.setdefault(cluster.cluster_id, {})[site] = cluster
    heaviest = sorted(at, key=lambda number: (-sum(cluster.count for cluster in at[number].values()), number))
    allocation = Allocation(context, budget)
    strategy = context.spec.selection.strategy
    assert isinstance(strategy, FederatedKMeansSpec)
    rng = context.rng("picks") if strategy.pick == "drawn" else None
    winners: dict[int, tuple[tuple[str, int], ...]] = {}
    pools: dict[int, dict[Pool, int]] = {
        number: {(site, number): cluster.count for site, cluster in at[number].items()} for number in heaviest
    }
    if context.spec.privacy.selection.noised:
        # Every cluster gives alike, as far as its counts reach; within it sites give by the rows that they have.
        amounts = [budget // len(heaviest) + (rank < budget % len(heaviest)) for rank in range(len(heaviest))]
        if strategy.shares != "equal":
            amounts = group_shares([sum(pools[number].values()) for number in heaviest], budget, strategy.shares)
        for number, share in zip(heaviest, amounts, strict=True):
            allocation.divide(pools[number], share, exactly=False, rng=rng)
    elif strategy.regrouped:
        allocation.give([pools[number] for number in heaviest], budget, shares=strategy.shares, rng=rng)
    else:
        for number in heaviest[:budget]:
            nearest = sorted(at[number], key=lambda site: (at[number][site].nearest, context.rank(site)))
            if winner := allocation.first((site, number) for site in nearest):
                winners[number] = ((winner[0], number),)
        left: dict[Pool, int] = {
            (site, number): cluster.count - allocation.counts[site, number]
            for number in at
            for site, cluster in at[number].items()
        }
        allocation.divide(left, budget - allocation.counts.total(), exactly=True)
    counts = allocation.counts
    if not winners:
        winners = {number: tuple((site, number) for site in at[number] if counts[site, number]) for number in at}
    groups = tuple(
        Group(tuple((site, number) for site in sorted(at[number])), winners.get(number, ())) for number in sorted(at)
    )
    shared = sum(len(group.members) > 1 for group in groups)
    note = (
        f"{len(groups)} clusters over {len(reports)} sites, {shared} of them with rows of several sites; "
        f"{counts.total()} rows are picked"
    )
    plane = pca_2d(np.array(centers.values).reshape(-1, centers.dimension)).tolist()
    places = {member: plane[member[1]] for group in groups for member in group.members}
    return Selection(coresets(counts, reports), groups, (note,), places)
