"""FedHDS at the site (arXiv 2410.10926, 3.2 and 3.3): features, reduction, HDBSCAN; as published, and aligned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedhds.privacy.mechanisms import centroid_sensitivity, clip, noised_centroids, site_rng
from fedhds.spec import ClusteringSpec
from fedhds.v2.selection_pb2 import Centroid, ClusterReport
from fedhds_client.features.clustering import cluster
from fedhds_client.features.reduction import reduce
from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.coreset import in_drawn_order, save_clusters

if TYPE_CHECKING:
    from fedhds_client.features.clustering import Clusters

logger = logging.getLogger(__name__)


class FedHds(IntraClientSelection):
    """Clusters of the reduced features.

    As published, centroids are points of the reduction, so every site's are in a frame of its own. In a shared space
    they are points of the features; the reduction only decides which rows belong together.
    """

    def release(self, context: SelectionContext) -> ClusterReport:
        features, spec, strategy = context.features(), context.spec, context.spec.selection.strategy
        assert isinstance(strategy, ClusteringSpec)
        points, note = reduce(features.values, strategy.reduction, seed=spec.seed)
        context.progress(0.5)
        places = features.values if strategy.shared_space else None
        clusters = cluster(
            features.ids,
            points,
            min_cluster_size=strategy.min_cluster_size,
            min_rows=context.reporter.min_cluster_rows,
            places=places,
        )
        context.progress(1.0)
        for text in filter(None, (note, clusters.note)):
            logger.info("%s: %s", context.reporter.site, text)
        context.draw_map(features, points, clusters.labels)
        return release_clusters(context, clusters)


def release_clusters(context: SelectionContext, clusters: Clusters) -> ClusterReport:
    """The report on `clusters`; its members, its bytes and its ledger entry are durable when it is returned.

    Unit: the client, under replacement of its whole shard. With noise, exactly `released_centroids` are reported, the
    largest clusters first: others stay at home, padding has no members, and no count leaves. Sensitivity:
    `centroid_sensitivity`. Without noise there is no guarantee, and the entry says so. It lapses also when one task is
    drawn twice, so ask `PrivateReporter.earlier` first. Raises as `PrivateReporter.record` does.
    """
    reporter, privacy = context.reporter, context.spec.privacy.selection
    members, values, sensitivity = clusters.members, clusters.centroids, None
    unclustered = clusters.unclustered
    if privacy.noised:
        unclustered = ()
        members = (*members, *[()] * privacy.released_centroids)[: privacy.released_centroids]
        values = noised_centroids(
            values,
            clip_norm=privacy.clip_norm,
            noise_multiplier=privacy.noise_multiplier,
            released=privacy.released_centroids,
            rng=site_rng(),
        )
    elif privacy.clip_norm:
        values = clip(values, privacy.clip_norm)
    if privacy.clip_norm:
        sensitivity = centroid_sensitivity(clip_norm=privacy.clip_norm, released=len(members))
    report = ClusterReport(
        dimension=values.shape[1],
        centroids=[
            Centroid(cluster_id=number, values=row, size=0 if privacy.noised else len(members[number]))
            for number, row in enumerate(values)
        ],
        unclustered=len(unclustered),
        clip_norm=privacy.clip_norm,
        noise_std=privacy.noise_multiplier * (sensitivity or 0.0),
    )
    reporter.check_budget()
    strategy = context.spec.selection.strategy
    assert isinstance(strategy, ClusteringSpec)
    order = members
    if strategy.pick == "drawn":
        order = tuple(
            map(tuple, in_drawn_order(members, rows=context.rows, seed=context.spec.seed, task_id=context.task_id))
        )
    save_clusters(reporter.folder, reporter.run_id, context.task_id, order, unclustered=unclustered, rows=context.rows)
    reporter.record(
        context.task_id,
        report,
        release="centroids",
        sensitivity=sensitivity,
        released=len(members),
        dimension=report.dimension,
    )
    return report
