"""Filters before a strategy: the threshold of each follows from the histograms of all sites' scores, added up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhds.spec import BINS, FILTER_SPECS, RunSpec
from fedhds.v2.selection_pb2 import Coreset, FilteredRequest, ScoreHistogram, ScoreRange
from fedhds_server.selection.base import NOISE_TAIL, Report

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Filtered:
    """What a step of a filtered selection has found: how it goes on, and how many rows each site has left."""

    request: FilteredRequest
    rows: Mapping[str, int]
    note: str


def fault_of(report: ScoreHistogram, spec: RunSpec, *, request: FilteredRequest, rows: int) -> str:
    """Why a histogram of a site that has `rows` rows left cannot count; empty when it can."""
    if report.filter != request.filter or len(report.counts) != BINS:
        return f"it does not have the {BINS} bins of the filter {request.filter}"
    fault = counts_fault(report.counts, report.noise_std, spec, rows=rows, known=not request.ranges)
    return fault and f"its histogram of {request.filter} {fault}"


def counts_fault(counts: object, noise_std: float, spec: RunSpec, *, rows: int, known: bool) -> str:
    """Why counts over bins cannot be those of `rows` rows, one bin each; `known`: all of the rows are in them.

    Under noise what earlier steps have left is known up to their noise only: then `rows` is an upper bound.
    """
    values = np.array(counts, dtype=np.float64)
    privacy = spec.privacy.selection
    std = privacy.noise_multiplier if privacy.noised else 0.0
    if not math.isclose(noise_std, std, rel_tol=1e-6):
        return "lacks the noise that the run asks for, or has noise that it does not ask for"
    if not privacy.noised:
        if (values < 0).any() or values.sum() != rows:
            return f"does not add up to the {rows} rows that the site has"
        return ""
    # Rounding moves a count by one half.
    tail = NOISE_TAIL * std + 1
    excess = values.sum() - rows
    if (np.abs(values) > rows + tail).any() or excess > tail * math.sqrt(len(values)):
        return "counts more rows than the site has"
    if known and -excess > tail * math.sqrt(len(values)):
        return "counts fewer rows than the site has"
    return ""


def filtered(
    request: FilteredRequest, spec: RunSpec, reports: Mapping[str, Report], rows: Mapping[str, int]
) -> Filtered:
    """The step after a filter's: its range goes into the request, and the rows of each site are those within it."""
    name = request.filter
    counts = {site: np.array(report.message.counts, dtype=np.int64) for site, report in reports.items()}
    total = np.sum([*counts.values(), np.zeros(BINS, dtype=np.int64)], axis=0)
    first, last = kept_bins(total, float(spec.selection.filter_keep[:-1]) / 100, keeps=FILTER_SPECS[name].keeps)
    own = ScoreRange(filter=name, first=first, last=last)
    left = {site: min(rows[site], rows_within(values, own)) for site, values in counts.items()}
    names = spec.selection.filter_names
    following = (*names, "")[names.index(name) + 1]
    note = f"filter {name}: {sum(left.values())} of {sum(rows[site] for site in counts)} rows stay"
    return Filtered(FilteredRequest(ranges=[*request.ranges, own], filter=following), left, note)


def kept_bins(counts: Counts, keep: float, *, keeps: str) -> tuple[int, int]:
    """First and last bin that stay so that the share `keep` of all rows does, and no more bins than that needs.

    `keeps` is "high", or "middle": then as many rows go at both ends, and the share is met in between.
    """
    total = float(counts.sum())
    if total <= 0:
        return 0, BINS - 1
    # A hair of slack, for shares are binary floats.
    drop = (1 - keep) * total / (2 if keeps == "middle" else 1) + 1e-9 * total
    first = _bins_within(counts, drop)
    last = BINS - 1 - (_bins_within(counts[::-1], drop) if keeps == "middle" else 0)
    return first, max(first, last)


def _bins_within(counts: Counts, rows: float) -> int:
    """How many of the first bins hold no more than `rows` rows together; one bin always stays."""
    beyond = np.flatnonzero(np.cumsum(counts) > rows)
    return int(beyond[0]) if len(beyond) else BINS - 1


def rows_within(counts: Counts, own: ScoreRange) -> int:
    """Rows in a range; under noise never below 0."""
    return max(0, int(counts[own.first : own.last + 1].sum()))


def with_ranges(coresets: Mapping[str, Coreset], request: FilteredRequest) -> dict[str, Coreset]:
    """Coresets that are drawn from the rows that filters keep; picks are of such rows already."""
    ranged = {}
    for site, coreset in coresets.items():
        ranged[site] = Coreset()
        ranged[site].CopyFrom(coreset)
        if coreset.WhichOneof("rows") != "picks":
            ranged[site].ranges.extend(request.ranges)
    return ranged
