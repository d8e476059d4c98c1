"""Targeted selection at a site: queries of its target rows, and how its rows compare with everybody's queries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedhds.errors import PrivacyError, TaskError
from fedhds.privacy.mechanisms import centroid_sensitivity, clip, noised_centroids, noised_counts, site_rng
from fedhds.spec import BINS
from fedhds.spec.strategies import TargetSpec
from fedhds.v2.selection_pb2 import QueryRows, TargetQueries, TargetReport
from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.coreset import save_clusters
from fedhds_client.selection.filters import check_noise, put_together
from fedhds_client.selection.private_reporter import PrivateReporter

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds_client.features.extraction import Features

FloatArray = npt.NDArray[np.float64]

# Distances of vectors of length 1 are at most 2.
_BINS_PER_UNIT = BINS / 2
_BLOCK = 4096
# Beyond what a coordinator merges queries to, it only fills the site's memory.
_MAX_QUERIES = 256


class Target(IntraClientSelection):
    """Queries in the first step, if the site has target rows; then a histogram of similarities."""

    def check_policy(self, reporter: PrivateReporter) -> None:
        check_noise(reporter)

    def report(self, context: SelectionContext) -> Message:
        if context.request is not None:
            return super().report(context)
        if context.target is None:
            # Says that the site has none, and nothing of any row.
            return TargetReport()
        return super().report(replace(context, reporter=context.target.reporter))

    def release(self, context: SelectionContext) -> TargetReport:
        strategy = context.spec.selection.strategy
        assert isinstance(strategy, TargetSpec)
        gradients = strategy.compares == "gradients"
        if context.request is None:
            assert context.target is not None
            vectors = (context.target.gradients if gradients else context.target.features)()
            return _release_queries(context, strategy, vectors)
        return _release_rows(context, context.request, context.gradients(None) if gradients else context.features())


def _release_queries(context: SelectionContext, strategy: TargetSpec, vectors: Features) -> TargetReport:
    """Means over groups of the target rows; unit with noise: the client, whose target rows are all replaced."""
    reporter, privacy = context.reporter, context.spec.privacy.selection
    if len(vectors.ids) < reporter.min_cluster_rows:
        raise PrivacyError(
            f"a mean over {len(vectors.ids)} target rows says what each of them is like; give "
            f"{reporter.min_cluster_rows}, or consent with a smaller --min-cluster-rows"
        )
    means = _means(vectors.values, strategy.target_queries, least=reporter.min_cluster_rows, seed=context.spec.seed)
    sensitivity, std = None, 0.0
    if privacy.noised:
        # Their number is hidden: of fewer ones some are released twice.
        means = means[np.arange(strategy.target_queries) % len(means)]
        released = len(means)
        sensitivity = centroid_sensitivity(clip_norm=privacy.clip_norm, released=released)
        std = privacy.noise_multiplier * sensitivity
        means = noised_centroids(
            means,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            released=released,
            rng=site_rng(),
        )
    elif privacy.clip_norm:
        means = clip(means, privacy.clip_norm)
    report = TargetReport(dimension=means.shape[1], values=means.astype(np.float32).ravel(), values_noise_std=std)
    reporter.record(
        context.task_id,
        report,
        release="means of target rows",
        sensitivity=sensitivity,
        released=len(means),
        dimension=report.dimension,
    )
    return report


def _means(values: npt.NDArray[np.float32], queries: int, *, least: int, seed: int) -> FloatArray:
    """Means (k, d) of up to so many groups by k-means, none of fewer than `least` rows."""
    from sklearn.cluster import KMeans

    rows = values.astype(np.float64)
    distinct = len(np.unique(values, axis=0))
    for count in range(min(queries, len(rows) // least, distinct), 1, -1):
        labels = KMeans(count, n_init=4, random_state=seed).fit(rows).labels_
        if np.bincount(labels, minlength=count).min() >= least:
            return np.stack([rows[labels == label].mean(axis=0) for label in range(count)])
    whole: FloatArray = rows.mean(axis=0, keepdims=True)
    return whole


def _release_rows(context: SelectionContext, request: TargetQueries, vectors: Features) -> TargetReport:
    """Counts of rows by their nearest query and the distance to it; unit with noise: one row, which is in one bin."""
    reporter, privacy = context.reporter, context.spec.privacy.selection
    queries = _queries(request, context.spec.selection.features.dimension)
    nearest, distances = _nearest(vectors.values, queries)
    bins = BINS - 1 - np.clip((distances * _BINS_PER_UNIT).astype(np.int64), 0, BINS - 1)
    order = np.lexsort((vectors.ids, distances))
    if not privacy.noised:
        nearest, bins, order = _told(nearest, bins, order, least=reporter.min_cluster_rows)
    counts = np.zeros((len(queries), BINS), dtype=np.int64)
    np.add.at(counts, (nearest, bins), 1)
    report = TargetReport()
    if privacy.noised:
        report.noise_std = privacy.noise_multiplier
        counts = noised_counts(counts, noise_multiplier=privacy.noise_multiplier, rng=site_rng())
    for number, own in enumerate(counts):
        if privacy.noised or own.any():
            report.queries.append(QueryRows(query_id=number, counts=own.tolist()))
    reporter.check_budget()
    members = [[int(vectors.ids[row]) for row in order if nearest[row] == number] for number in range(len(queries))]
    save_clusters(reporter.folder, reporter.run_id, context.task_id, members, rows=context.rows)
    reporter.record(
        context.task_id,
        report,
        release="counts of rows by similarity",
        sensitivity=1.0 if privacy.noised else None,
        released=counts.size,
        dimension=1,
    )
    context.draw_map(vectors, vectors.values, nearest)
    return report


def _queries(request: TargetQueries, dimension: int) -> FloatArray:
    """The queries (k, dimension); raises TaskError for what no coordinator of this version sends."""
    count, rest = divmod(len(request.values), dimension)
    if request.dimension != dimension or rest or not 0 < count <= _MAX_QUERIES:
        raise TaskError(f"the task does not have 1 to {_MAX_QUERIES} queries of the run's {dimension} values")
    queries = np.array(request.values, dtype=np.float64).reshape(count, dimension)
    if not np.isfinite(queries).all():
        raise TaskError("the task has a query that holds values which are not finite")
    return queries


def _nearest(values: npt.NDArray[np.float32], queries: FloatArray) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Of each row the number of its nearest query (of equally near ones the first) and the distance, each (n,)."""
    from scipy.spatial.distance import cdist

    nearest, distances = np.zeros(len(values), dtype=np.int64), np.zeros(len(values))
    for start in range(0, len(values), _BLOCK):
        block = cdist(values[start : start + _BLOCK].astype(np.float64), queries)
        nearest[start : start + len(block)] = block.argmin(axis=1)
        distances[start : start + len(block)] = block.min(axis=1)
    return nearest, distances


def _told(
    nearest: npt.NDArray[np.int64], bins: npt.NDArray[np.int64], order: npt.NDArray[np.int64], *, least: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Queries, bins and order of rows so that no count is over fewer than `least` of them.

    Rows of queries with fewer rows here go to the query with most, as its least similar ones.
    """
    nearest, bins = nearest.copy(), bins.copy()
    counts = np.bincount(nearest, minlength=1)
    few = counts[nearest] < least
    main = int(counts.argmax()) if len(nearest) >= least else 0
    for number in np.flatnonzero(counts >= least):
        # From the least similar one on, so that rows of one bin are told in the order in which they are picked.
        own = order[::-1][nearest[order[::-1]] == number]
        bins[own] = put_together(bins[own], least=least)
    moved = np.flatnonzero(few)
    nearest[moved] = main
    bins[moved] = 0
    if 0 < len(moved) < least and (counts >= least).any():
        # Alone in the lowest bin they would be counted: they are counted with the least similar rows of that query.
        bins[moved] = bins[(nearest == main) & ~few].min()
    return nearest, bins, np.concatenate([order[~few[order]], order[few[order]]])
