"""FedHDS at the site (arXiv 2410.10926, 3.2 and 3.3): all-layer features, fusion, HDBSCAN; and the same aligned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedhds_client.clustering import cluster
from fedhds_client.fusion import fuse
from fedhds_client.selection.base import IntraClientSelection, SelectionContext

if TYPE_CHECKING:
    from fedhds.v1 import federation_pb2 as pb


logger = logging.getLogger(__name__)


class FedHds(IntraClientSelection):
    """Clusters of the fused features.

    As published, centroids are points of the fusion, so every site's live in a frame of its own. `aligned`, they are
    points of the feature space that all sites share; the fusion only decides which rows belong together.
    """

    def __init__(self, *, aligned: bool) -> None:
        self._aligned = aligned

    def release(self, context: SelectionContext) -> pb.ClusterReport:
        """Releases the clusters' centroids."""
        features, spec = context.features(), context.spec
        points, note = fuse(features.values, spec.fusion, seed=spec.seed)
        places = features.values if self._aligned else None
        clusters = cluster(features.ids, points, min_cluster_size=spec.min_cluster_size, places=places)
        for said in filter(None, (note, clusters.note)):
            logger.info("%s: %s", context.releases.site, said)
        context.chart(features, points, clusters.labels)
        return context.releases.release_clusters(context.task_id, clusters, rows=context.rows)
