"""FedHDS at the site (arXiv 2410.10926, 3.2 and 3.3): all-layer features, fusion, HDBSCAN."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedhds_client.clustering import Clusters, cluster
from fedhds_client.fusion import fuse
from fedhds_client.selection.base import IntraClientSelection

if TYPE_CHECKING:
    from fedhds.runspec import RunSpec
    from fedhds_client.features import Features


class FedHds(IntraClientSelection):
    """The paper's: every site in a frame of its own."""

    def clusters(self, features: Features, spec: RunSpec) -> Clusters:
        """Clusters the fused features."""
        points, note = fuse(features.values, spec.fusion, seed=spec.seed)
        found = cluster(features.ids, points, min_cluster_size=spec.min_cluster_size)
        return replace(found, note="; ".join(filter(None, (note, found.note))))
