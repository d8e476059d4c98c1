"""Sums over clusters as sites report them: checked before they count, and added up exactly."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedhds.kmeans import SUM_UNIT
from fedhds.privacy.mechanisms import cluster_sensitivity
from fedhds.spec import RunSpec
from fedhds.v2.selection_pb2 import ClusterStats, KMeansCenters, KMeansStats
from fedhds_server.selection.base import LENGTH_SLACK, NOISE_TAIL

_MAX_SUM = 2**62


def fault_of(report: KMeansStats, spec: RunSpec, *, centers: KMeansCenters | None, rows: int) -> str:
    """Why a report of a site with `rows` rows cannot count; empty when it can."""
    privacy = spec.privacy.selection
    count = len(centers.values) // centers.dimension if centers else 1
    dimension = spec.selection.features.dimension
    if report.dimension != dimension:
        return f"its sums have {report.dimension} values, the run's features {dimension}"
    numbers = [cluster.cluster_id for cluster in report.clusters]
    if len(set(numbers)) < len(numbers):
        return "a cluster is reported twice"
    if any(number >= count for number in numbers) or any(len(each.sums) != dimension for each in report.clusters):
        return "a cluster has no center, or has another number of values than the report says"
    counts = [cluster.count for cluster in report.clusters]
    std = 0.0
    if privacy.noised:
        std = privacy.noise_multiplier * cluster_sensitivity(clip_norm=privacy.clip_norm)
        given = math.isclose(report.noise_std, std, rel_tol=1e-6)
        # More would hide the clusters of all sites, less would not protect its own rows.
        if not given or any(cluster.HasField("nearest") for cluster in report.clusters):
            return "it lacks the noise that the run asks for"
        if len(numbers) < count:
            return "under noise every cluster must be reported"
    elif report.noise_std or any(number < 1 for number in counts):
        return "a cluster without rows is reported, or noise that the run does not ask for"
    elif sum(counts) != rows:
        return f"its clusters do not add up to the {rows} rows that it declared"
    tail = NOISE_TAIL * std
    if any(abs(number) > rows + tail for number in counts):
        return "a count is larger than the site's rows"
    missing = rows - sum(counts)
    # Under noise nobody knows how many of the rows filters have left.
    if max(-missing, 0 if spec.selection.filters else missing) > tail * math.sqrt(len(counts)):
        return f"its counts are too far from the {rows} rows that it declared"
    if (rows + tail) * SUM_UNIT > _MAX_SUM / 64:
        return "a sum is larger than its rows can give"
    return _geometry_fault(report, spec, centers, noise_std=std) if numbers else ""


def _geometry_fault(report: KMeansStats, spec: RunSpec, centers: KMeansCenters | None, *, noise_std: float) -> str:
    """Why sums and distances cannot be those of rows of the run's features, all of which have one known length."""
    norm = min(1.0, spec.privacy.selection.clip_norm or 1.0)
    counts = np.array([cluster.count for cluster in report.clusters], dtype=np.float64)
    sums = np.array([cluster.sums for cluster in report.clusters], dtype=np.int64).astype(np.float64) / SUM_UNIT
    lengths = np.linalg.norm(sums, axis=1)
    rows = np.maximum(0.0, counts + NOISE_TAIL * noise_std)
    if (lengths > rows * norm * (1 + LENGTH_SLACK) + noise_std * (math.sqrt(sums.shape[1]) + NOISE_TAIL)).any():
        return "a sum is larger than its rows can give"
    given = [cluster.HasField("nearest") for cluster in report.clusters]
    if not any(given):
        return "a cluster lacks the distance of its nearest row" if _asks_distances(spec, centers) else ""
    if centers is None or not _asks_distances(spec, centers) or not all(given):
        return "it has distances that were not asked for, or lacks some"
    places = np.array(centers.values, dtype=np.float64).reshape(-1, centers.dimension)
    places = places[[cluster.cluster_id for cluster in report.clusters]]
    nearest = np.array([cluster.nearest for cluster in report.clusters])
    reach = np.linalg.norm(places, axis=1)
    along = (places * sums).sum(axis=1)
    squares = norm**2 + reach**2
    # The nearest row is no farther than the mean of them, and no nearer than one for which all others lie as far as
    # they can; of a single row the distance follows from its sum.
    farthest = squares - 2 * along / counts
    least = squares - 2 * np.minimum(reach * norm, along + (counts - 1) * reach * norm)
    # Written so that NaN is refused, too.
    if not ((nearest >= 0) & (nearest >= least - LENGTH_SLACK) & (nearest <= farthest + LENGTH_SLACK)).all():
        return "a distance does not fit its cluster's sum and count"
    return ""


def _asks_distances(spec: RunSpec, centers: KMeansCenters | None) -> bool:
    return centers is not None and centers.last and not spec.privacy.selection.noised


def added(total: KMeansStats, report: KMeansStats) -> KMeansStats:
    """The sum of both, cluster by cluster; exact, so that any order gives the same bytes."""
    counts: dict[int, int] = {}
    sums: dict[int, npt.NDArray[np.int64]] = {}
    for part in (total, report):
        for cluster in part.clusters:
            values = np.array(cluster.sums, dtype=np.int64)
            before = sums.get(cluster.cluster_id)
            sums[cluster.cluster_id] = values if before is None else before + values
            counts[cluster.cluster_id] = counts.get(cluster.cluster_id, 0) + cluster.count
    return KMeansStats(
        dimension=report.dimension,
        clusters=[
            ClusterStats(cluster_id=number, count=counts[number], sums=sums[number].tolist()) for number in sorted(sums)
        ],
        # Of independent noises the variances add.
        noise_std=math.hypot(total.noise_std, report.noise_std),
    )


def without_sums(report: KMeansStats) -> KMeansStats:
    """Only the counts and distances."""
    kept = KMeansStats(dimension=report.dimension, noise_std=report.noise_std)
    for cluster in report.clusters:
        kept.clusters.add().CopyFrom(cluster)
        del kept.clusters[-1].sums[:]
    return kept
