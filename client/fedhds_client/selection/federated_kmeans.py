"""Federated k-means at the site: sums and counts of its rows for the coordinator's centers, iteration by iteration."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from fedhds.errors import PrivacyError
from fedhds.kmeans import SUM_UNIT
from fedhds.privacy.mechanisms import cluster_sensitivity, noised_clusters, site_rng
from fedhds.spec import FederatedKMeansSpec
from fedhds.v2.selection_pb2 import KMeansCenters, KMeansStats
from fedhds_client.features.assignment import assign
from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.coreset import in_drawn_order, save_clusters
from fedhds_client.selection.private_reporter import MIN_NOISE_MULTIPLIER, PrivateReporter

if TYPE_CHECKING:
    from fedhds_client.features.assignment import Assignment


class FederatedKMeans(IntraClientSelection):
    """Sums and counts per center; after the last iteration the site remembers which rows belong to which center."""

    def check_policy(self, reporter: PrivateReporter) -> None:
        if not reporter.hides_rows and not reporter.allow_exact_kmeans_sums:
            raise PrivacyError(
                "federated k-means without noise sends sums that may be over a single row, and this site has not "
                "agreed to that: start it with --allow-exact-kmeans-sums, or the run with a noise multiplier of "
                f"{MIN_NOISE_MULTIPLIER} at least"
            )

    def release(self, context: SelectionContext) -> KMeansStats:
        spec = context.spec
        request: KMeansCenters | None = context.request
        features = context.features()
        centers = np.zeros((1, spec.selection.features.dimension))
        if request is not None:
            centers = np.array(request.values, dtype=np.float64).reshape(-1, request.dimension)
        assignment = assign(features, centers, norm=spec.privacy.selection.clip_norm)
        last = request is not None and request.last
        if last:
            context.draw_map(features, features.values, assignment.labels)
        return release_sums(context, assignment, last=last)


def release_sums(context: SelectionContext, assignment: Assignment, *, last: bool) -> KMeansStats:
    """The report on an assignment of rows to centers, durable with its ledger entry when it is returned.

    In the `last` iteration the members of clusters are kept, too. Unit with noise: one row, left out; every cluster is
    reported, with `cluster_sensitivity`, and no distance. The noise composes over iterations. Without noise the
    clusters that have rows are reported exactly, and in the last iteration the squared distance of the nearest row of
    each. Raises as `PrivateReporter.record` does.
    """
    reporter, privacy = context.reporter, context.spec.privacy.selection
    sums, counts = assignment.sums, assignment.counts
    report = KMeansStats(dimension=sums.shape[1])
    sensitivity = None
    if privacy.noised:
        sensitivity = cluster_sensitivity(clip_norm=privacy.clip_norm)
        report.noise_std = privacy.noise_multiplier * sensitivity
        noised, noised_counts = noised_clusters(
            sums / SUM_UNIT,
            counts,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            rng=site_rng(),
        )
        sums, counts = np.rint(noised * SUM_UNIT).astype(np.int64), np.rint(noised_counts).astype(np.int64)
    # Sorted by center, then by distance: the first row of a center is its nearest.
    order = np.lexsort((assignment.squares, assignment.labels))
    firsts = order[np.searchsorted(assignment.labels[order], np.arange(len(counts))) % max(1, len(order))]
    for number, count in enumerate(counts.tolist()):
        if not privacy.noised and not count:
            continue
        cluster = report.clusters.add(cluster_id=number, count=count, sums=sums[number].tolist())
        if last and not privacy.noised:
            cluster.nearest = assignment.squares[firsts[number]]
    reporter.check_budget()
    if last:
        strategy = context.spec.selection.strategy
        assert isinstance(strategy, FederatedKMeansSpec)
        # Far-apart picks all change when one row is left out; DP-SGD allows that one is replaced.
        spread = privacy.noised and not context.spec.privacy.training.noised
        members = assignment.members(spread=spread)
        if strategy.pick == "drawn":
            members = in_drawn_order(members, rows=context.rows, seed=context.spec.seed, task_id=context.task_id)
        save_clusters(reporter.folder, reporter.run_id, context.task_id, members, rows=context.rows)
    reporter.record(
        context.task_id,
        report,
        release="cluster statistics",
        sensitivity=sensitivity,
        released=len(report.clusters),
        dimension=report.dimension,
        # One line for the whole selection: it has a dozen iterations.
        log_level=logging.INFO if last else logging.DEBUG,
    )
    return report
