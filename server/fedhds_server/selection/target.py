"""Targeted selection: queries go round, and every query gives the rows of all sites that are most similar to it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedhds.privacy.mechanisms import centroid_sensitivity
from fedhds.spec import BINS, RunSpec
from fedhds.spec.strategies import TargetSpec
from fedhds.v2.selection_pb2 import TargetQueries, TargetReport
from fedhds_server.selection.allocation import Allocation, Pool, coresets, group_shares
from fedhds_server.selection.base import (
    LENGTH_SLACK,
    NOISE_TAIL,
    Group,
    InterClientSelection,
    Report,
    Selection,
    SelectionContext,
)
from fedhds_server.selection.filters import counts_fault
from fedhds_server.selection.pca_2d import pca_2d
from fedhds_server.selection.ward import ward_labels

# Of all sites together; more are merged to so many. Each costs a site's report as many counts as there are bins.
_MAX_QUERIES = 256


class Target(InterClientSelection):
    """Step one gathers queries, step two histograms of similarities to them.

    Queries divide the budget alike, so that none starves, and each takes its most similar rows over all sites, down to
    a threshold that its histogram gives; what a query has no rows for goes to the others.
    """

    def check(self, spec: RunSpec, request: TargetQueries | None, report: TargetReport, *, rows: int) -> str:
        if request is None:
            return "it counts rows before there are queries" if report.queries else _queries_fault(report, spec)
        if report.values or report.values_noise_std or report.dimension:
            return "it has queries, which were not asked for"
        count = len(request.values) // request.dimension
        numbers = [query.query_id for query in report.queries]
        if len(set(numbers)) < len(numbers) or any(number >= count for number in numbers):
            return "a query is reported twice, or was not asked for"
        if any(len(query.counts) != BINS for query in report.queries):
            return f"a query does not have {BINS} bins"
        if spec.privacy.selection.noised and len(numbers) < count:
            return "under noise every query must be reported"
        counts = [number for query in report.queries for number in query.counts]
        fault = counts_fault(counts, report.noise_std, spec, rows=rows, known=not spec.selection.filters)
        return fault and f"its histogram {fault}"

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection | TargetQueries:
        if context.request is None:
            return _gathered(context, reports)
        return _picks(context, reports)


def _queries_fault(report: TargetReport, spec: RunSpec) -> str:
    strategy, privacy = spec.selection.strategy, spec.privacy.selection
    assert isinstance(strategy, TargetSpec)
    if not report.values:
        return "it has noise without queries" if report.values_noise_std or report.noise_std else ""
    dimension = spec.selection.features.dimension
    count, rest = divmod(len(report.values), dimension)
    if report.dimension != dimension or rest or count > strategy.target_queries:
        return f"it does not have at most {strategy.target_queries} queries of {dimension} values"
    values = np.array(report.values, dtype=np.float64).reshape(count, dimension)
    if not np.isfinite(values).all():
        return "a query holds values that are not finite"
    std = 0.0
    if privacy.noised:
        sensitivity = centroid_sensitivity(clip_norm=privacy.clip_norm, released=strategy.target_queries)
        std = privacy.noise_multiplier * sensitivity
        if count != strategy.target_queries:
            return f"under noise it must have exactly {strategy.target_queries} queries"
    if not math.isclose(report.values_noise_std, std, rel_tol=1e-6):
        return "its queries lack the noise that the run asks for, or have noise that it does not ask for"
    room = min(1.0, privacy.clip_norm or 1.0) * (1 + LENGTH_SLACK) + std * (math.sqrt(dimension) + NOISE_TAIL)
    if np.linalg.norm(values, axis=1).max() > room:
        return "a query is longer than a mean of vectors of length 1 can be"
    return ""


def _gathered(context: SelectionContext, reports: Mapping[str, Report]) -> Selection | TargetQueries:
    """The queries of all sites, each of length 1; the most similar ones merged where there are too many."""
    dimension = context.spec.selection.features.dimension
    own = [
        np.array(reports[site].message.values, dtype=np.float64).reshape(-1, dimension)
        for site in sorted(reports, key=context.rank)
    ]
    queries = _unit(np.concatenate([*own, np.zeros((0, dimension))]))
    if not len(queries):
        return Selection({}, notes=("no site has target rows; start one with --target-data",))
    labels = ward_labels(queries, np.ones(len(queries)), max(1, min(_MAX_QUERIES, context.budget or 1)))
    merged = _unit(np.stack([queries[labels == label].mean(axis=0) for label in range(labels.max() + 1)]))
    return TargetQueries(dimension=dimension, values=merged.astype(np.float32).ravel())


def _unit(vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Without those that have no direction."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    kept: npt.NDArray[np.float64] = (vectors / np.maximum(lengths, 1e-12))[lengths[:, 0] > 1e-9]
    return kept


def _picks(context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
    budget, allocation = context.budget or 0, Allocation(context, context.budget or 0)
    counts: dict[int, dict[str, npt.NDArray[np.int64]]] = {}
    for site in sorted(reports):
        for query in reports[site].message.queries:
            rows = np.maximum(0, np.array(query.counts, dtype=np.int64))
            if rows.any():
                counts.setdefault(query.query_id, {})[site] = rows
    noised = context.spec.privacy.selection.noised
    numbers = sorted(counts)
    sizes = [int(sum(rows.sum() for rows in counts[number].values())) for number in numbers]
    for number, share in zip(numbers, group_shares(sizes, budget, "equal"), strict=True):
        _most_similar(allocation, number, counts[number], share)
    if not noised:
        left: dict[Pool, int] = {
            (site, number): int(rows.sum()) - allocation.counts[site, number]
            for number in numbers
            for site, rows in counts[number].items()
        }
        allocation.divide(left, budget - allocation.counts.total(), exactly=True)
    given = allocation.counts
    groups = tuple(
        Group(
            tuple((site, number) for site in sorted(counts[number])),
            tuple((site, number) for site in sorted(counts[number]) if given[site, number]),
        )
        for number in numbers
    )
    note = f"{len(numbers)} queries have rows at {len(reports)} sites; {given.total()} rows are picked"
    plane = pca_2d(np.array(context.request.values).reshape(-1, context.request.dimension)).tolist()
    places = {member: plane[member[1]] for group in groups for member in group.members}
    return Selection(coresets(given, reports), groups, (note,), places)


def _most_similar(allocation: Allocation, number: int, counts: Mapping[str, npt.NDArray[np.int64]], share: int) -> None:
    """Gives a query's share from its highest bin down; of the last bin sites give in proportion."""
    before = allocation.counts.total()
    for bin_number in range(BINS - 1, -1, -1):
        missing = share - (allocation.counts.total() - before)
        if missing <= 0:
            return
        pools: dict[Pool, int] = {
            (site, number): int(rows[bin_number]) for site, rows in counts.items() if rows[bin_number]
        }
        if pools:
            allocation.divide(pools, missing, exactly=False)
