"""FedHDS's second layer (arXiv 2410.10926, inter-client selection): rows from every group of alike centroids."""

from __future__ import annotations

import math
from collections.abc import Mapping

import hdbscan
import numpy as np

from fedhds.privacy.mechanisms import centroid_sensitivity
from fedhds.spec import ClusteringSpec, RunSpec
from fedhds.v2.selection_pb2 import ClusterReport
from fedhds_server.selection.allocation import Allocation, Pool, coresets
from fedhds_server.selection.base import (
    LENGTH_SLACK,
    NOISE_TAIL,
    Group,
    InterClientSelection,
    Report,
    Selection,
    SelectionContext,
)
from fedhds_server.selection.pca_2d import pca_2d
from fedhds_server.selection.ward import ward_labels

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
        dimension, released = strategy.centroid_dimension(spec), privacy.released_centroids
        if report.dimension != dimension or any(len(each.values) != dimension for each in report.centroids):
            return f"its centroids do not have the {dimension} values that the run's features give"
        if len(report.centroids) > max(rows, released):
            return "it has more clusters than rows"
        numbers = [centroid.cluster_id for centroid in report.centroids]
        if len(set(numbers)) < len(numbers):
            return "a cluster is reported twice"
        if numbers and max(numbers) >= len(numbers):
            return "its clusters are not numbered from 0 on"
        std = privacy.noise_multiplier * centroid_sensitivity(clip_norm=privacy.clip_norm, released=released)
        if fault := _length_fault(spec, report, noise_std=std):
            return fault
        sizes = [centroid.size for centroid in report.centroids]
        if privacy.noised:
            if any(sizes) or report.unclustered:
                return "it counts rows, which the noise does not cover"
            if len(report.centroids) != released or not math.isclose(report.noise_std, std, rel_tol=1e-6):
                return f"it lacks the noise that the run asks for, on exactly {released} centroids"
            return ""
        if report.noise_std:
            return "it has noise that the run does not ask for"
        if sum(sizes) + report.unclustered != rows:
            return f"its clusters do not add up to the {rows} rows that it declared"
        # Where there are too few rows to cluster, each may be a cluster of its own.
        smallest = strategy.min_cluster_size if rows >= 2 * strategy.min_cluster_size else 1
        if any(size < smallest for size in sizes):
            return f"it has a cluster of fewer than {smallest} rows"
        return ""

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        strategy = context.spec.selection.strategy
        assert isinstance(strategy, ClusteringSpec)
        keys: list[tuple[str, int]] = []
        points: list[list[float]] = []
        pools: dict[Pool, int] = {}
        # In this order the first of equals is not the first by name.
        for site in sorted(reports, key=context.rank):
            report: ClusterReport = reports[site].message
            pools[site, None] = report.unclustered
            for centroid in sorted(report.centroids, key=lambda item: item.cluster_id):
                keys.append((site, centroid.cluster_id))
                points.append(list(centroid.values))
                pools[site, centroid.cluster_id] = centroid.size
        centroids = np.array(points, dtype=np.float64).reshape(len(keys), strategy.centroid_dimension(context.spec))
        if context.budget is None:
            labels = _paper_labels(centroids)
        else:
            labels = ward_labels(centroids, np.ones(len(keys)), strategy.groups or context.budget)
        budget = labels.max(initial=-1) + 1 if context.budget is None else context.budget
        allocation = Allocation(context, int(budget))
        if context.budget is not None and strategy.regrouped:
            groups = _shared(context, strategy, keys, labels, pools, allocation)
        else:
            groups = _groups(keys, centroids, labels, allocation)
        if context.budget is not None:
            left = {pool: size - allocation.counts[pool] for pool, size in pools.items()}
            allocation.divide(left, context.budget - allocation.counts.total(), exactly=True)
        counts = allocation.counts
        kept = sum(len(group.members) for group in groups)
        alone = sum(len(group.members) == 1 for group in groups)
        note = (
            f"{len(keys)} clusters of {len(reports)} sites: {kept} form {len(groups)} groups, {alone} of them alone; "
            f"{len(keys) - kept} are like no other and are dropped; {counts.total()} rows are picked"
        )
        places = dict(zip(keys, pca_2d(centroids).tolist(), strict=True))
        return Selection(coresets(counts, reports), groups, (note,), places)


def _length_fault(spec: RunSpec, report: ClusterReport, *, noise_std: float) -> str:
    """Why the centroids cannot be means of the run's features, whose length is known in a shared space."""
    values = np.array([centroid.values for centroid in report.centroids], dtype=np.float64)
    if not np.isfinite(values).all():
        return "a centroid holds values that are not finite"
    bounds = [privacy.clip_norm] if (privacy := spec.privacy.selection).clip_norm else []
    bounds += [1.0] * spec.selection.strategy.shared_space
    if not bounds or not len(values):
        return ""
    # Noise has about the length std * sqrt(d), and is never longer by 12 std.
    room = min(bounds) * (1 + LENGTH_SLACK) + noise_std * (math.sqrt(report.dimension) + NOISE_TAIL)
    if np.linalg.norm(values, axis=1).max() > room:
        return "a centroid is longer than a mean of the run's features can be"
    return ""


def _paper_labels(points: np.ndarray) -> np.ndarray:
    """The paper's groups (n,); -1: none."""
    labels = np.full(len(points), -1)
    if len(points) >= _MIN_POINTS:
        labels = hdbscan.HDBSCAN(min_cluster_size=_MIN_CLUSTER_SIZE).fit(points).labels_
    return labels if labels.max(initial=-1) >= 0 else np.arange(len(points))


def _groups(
    keys: list[tuple[str, int]], points: np.ndarray, labels: np.ndarray, allocation: Allocation
) -> tuple[Group, ...]:
    """The groups, the largest first; each gives a row of the cluster nearest to its center whose party has room."""
    groups = []
    members = [np.flatnonzero(labels == label) for label in range(labels.max(initial=-1) + 1)]
    for group in sorted(members, key=lambda group: (-len(group), group[0])):
        distances = np.linalg.norm(points[group] - points[group].mean(axis=0), axis=1)
        nearest = (keys[index] for index in group[np.argsort(distances, kind="stable")])
        winner = allocation.first(nearest)
        groups.append(Group(tuple(sorted(keys[index] for index in group)), (winner,) if winner else ()))
    return tuple(groups)


def _shared(
    context: SelectionContext,
    strategy: ClusteringSpec,
    keys: list[tuple[str, int]],
    labels: np.ndarray,
    pools: Mapping[Pool, int],
    allocation: Allocation,
) -> tuple[Group, ...]:
    """The groups, the largest first; each gives its share of the budget, from all of its clusters."""
    members = [
        [keys[index] for index in np.flatnonzero(labels == label)] for label in range(labels.max(initial=-1) + 1)
    ]
    members.sort(key=lambda group: (-sum(pools[key] for key in group), min(group)))
    allocation.give(
        [{key: pools[key] for key in group} for group in members],
        context.budget or 0,
        shares=strategy.shares,
        rng=context.rng("picks") if strategy.pick == "drawn" else None,
    )
    return tuple(
        Group(tuple(sorted(group)), tuple(key for key in group if allocation.counts[key])) for group in members
    )
