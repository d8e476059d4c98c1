"""Sums over clusters as sites report them: checked before they count, and added up exactly."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedhds.kmeans import SUM_UNIT
from fedhds.privacy.mechanisms import cluster_sensitivity
from fedhds.spec import RunSpec
from fedhds.v2.selection_pb2 import ClusterStats, KMeansCenters, KMeansStats

# What a site adds may exceed what its rows can give by this many standard deviations of its noise.
_NOISE_TAIL = 12.0
_MAX_SUM = 2**62


def fault_of(report: KMeansStats, spec: RunSpec, *, centers: KMeansCenters | None, rows: int) -> str:
    """Why a report of a site with `rows` rows cannot count; empty when it can."""
    privacy = spec.privacy.selection
    count = len(centers.values) // centers.dimension if centers else 1
    dimension = spec.selection.features.dimension
    if report.dimension != dimension:
        return f"its sums have {report.dimension} values, the run's features {dimension}"
    if len({cluster.cluster_id for cluster in report.clusters}) < len(report.clusters):
        return "a cluster is reported twice"
    if any(cluster.cluster_id >= count or len(cluster.sums) != report.dimension for cluster in report.clusters):
        return "a cluster has no center, or has another number of values than the report says"
    if privacy.noised:
        std = privacy.noise_multiplier * cluster_sensitivity(clip_norm=privacy.clip_norm)
        given = math.isclose(report.noise_std, std, rel_tol=1e-6)
        # More would hide the clusters of all sites, less would not protect its own rows.
        if not given or any(cluster.HasField("nearest") for cluster in report.clusters):
            return "it lacks the noise that the run asks for"
        if len(report.clusters) < count:
            return "under noise every cluster must be reported"
    elif report.noise_std or any(cluster.count < 1 for cluster in report.clusters):
        return "a cluster without rows is reported, or noise that the run does not ask for"
    elif sum(cluster.count for cluster in report.clusters) != rows:
        return f"its clusters do not add up to the {rows} rows that it declared"
    if any(cluster.HasField("nearest") and not 0 <= cluster.nearest < math.inf for cluster in report.clusters):
        return "a distance is negative or not finite"
    room = (rows + _NOISE_TAIL * report.noise_std) * SUM_UNIT
    if room > _MAX_SUM / 64 or any(abs(value) > room for cluster in report.clusters for value in cluster.sums):
        return "a sum is larger than its rows can give"
    if any(abs(cluster.count) > rows + _NOISE_TAIL * report.noise_std for cluster in report.clusters):
        return "a count is larger than the site's rows"
    return ""


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
