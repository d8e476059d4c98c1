"""Sums over cells as sites report them: checked before they count, and added up exactly."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedhds.lloyd import UNIT
from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb

# What a site adds may exceed what its rows can give by this many standard deviations of its noise.
_NOISE_TAIL = 12.0
_LARGEST = 2**62


def check(report: pb.CellReport, spec: RunSpec, *, centres: pb.Centres | None, rows: int) -> str:
    """Why a report of a site with `rows` rows cannot count; empty when it can."""
    number = len(centres.values) // centres.dimension if centres else 1
    if report.dimension != spec.feature_dimension:
        return f"its sums have {report.dimension} values, the run's features {spec.feature_dimension}"
    if len({cell.centre for cell in report.cells}) < len(report.cells):
        return "a cell is reported twice"
    if any(cell.centre >= number or len(cell.sums) != report.dimension for cell in report.cells):
        return "a cell is of no centre, or has another number of values than the report says"
    if spec.noised:
        if not 0 < report.noise_std < math.inf or any(cell.HasField("nearest") for cell in report.cells):
            return "it lacks the noise that the run asks for"
        if len(report.cells) < number:
            return "under noise every cell must be reported"
    elif report.noise_std or any(cell.count < 1 for cell in report.cells):
        return "a cell without rows is reported, or noise that the run does not ask for"
    elif sum(cell.count for cell in report.cells) != rows:
        return f"its cells do not add up to the {rows} rows that it declared"
    if any(cell.HasField("nearest") and not 0 <= cell.nearest < math.inf for cell in report.cells):
        return "a distance is negative or not finite"
    room = (rows + _NOISE_TAIL * report.noise_std) * UNIT
    if room > _LARGEST / 64 or any(abs(value) > room for cell in report.cells for value in cell.sums):
        return "a sum is larger than its rows can give"
    if any(abs(cell.count) > rows + _NOISE_TAIL * report.noise_std for cell in report.cells):
        return "a count is larger than the site's rows"
    return ""


def added(total: pb.CellReport, report: pb.CellReport) -> pb.CellReport:
    """The sum of both, cell by cell; exact, so that any order gives the same bytes."""
    counts: dict[int, int] = {}
    sums: dict[int, npt.NDArray[np.int64]] = {}
    for part in (total, report):
        for cell in part.cells:
            values = np.array(cell.sums, dtype=np.int64)
            sums[cell.centre] = sums[cell.centre] + values if cell.centre in sums else values
            counts[cell.centre] = counts.get(cell.centre, 0) + cell.count
    return pb.CellReport(
        dimension=report.dimension,
        cells=[pb.Cell(centre=centre, count=counts[centre], sums=sums[centre].tolist()) for centre in sorted(sums)],
        # Of independent noises the variances add.
        noise_std=math.hypot(total.noise_std, report.noise_std),
    )


def without_sums(report: pb.CellReport) -> pb.CellReport:
    """Only the counts and distances."""
    kept = pb.CellReport(dimension=report.dimension, noise_std=report.noise_std)
    for cell in report.cells:
        kept.cells.add().CopyFrom(cell)
        del kept.cells[-1].sums[:]
    return kept
