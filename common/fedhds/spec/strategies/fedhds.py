"""FedHDS (arXiv 2410.10926): sites cluster their rows, the coordinator clusters the sites' centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedhds.settings import parameter
from fedhds.spec.amounts import MAX_COUNT
from fedhds.spec.strategies.grouping import GroupingSpec

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds.spec.run import RunSpec

Reduction = Literal["tsne", "umap", "pca", "kpca", "none"]


# Dimensions of a reduction: those of a map, as published.
REDUCED_DIMENSION = 2


class ClusteringSpec(GroupingSpec):
    """The parameters of clustering at a site, shared by both variants of FedHDS."""

    privacy_unit = "client"
    released = "cluster centroids"

    reduction: Reduction = parameter("tsne", "Reduction of the features before a site clusters them.")
    min_cluster_size: int = parameter(2, "Smallest cluster at a site, in rows.", ge=2, le=MAX_COUNT)

    @property
    def report_type(self) -> type[Message]:
        from fedhds.v2.selection_pb2 import ClusterReport

        return ClusterReport

    def centroid_dimension(self, spec: RunSpec) -> int:
        """Values of a centroid: those of the features in a shared space, else those of the site's own reduction."""
        reduced = self.reduction != "none" and not self.shared_space
        return REDUCED_DIMENSION if reduced else spec.selection.features.dimension


class FedHdsSpec(ClusteringSpec):
    """As published (3.2, 3.3): centroids are points of each site's own reduction."""

    summary = "clusters at each site, then clusters of their centroids, as published"
    shared_space = False

    name: Literal["fedhds"] = "fedhds"

    def auto_budget(self, pool: int) -> int | None:
        return None


class FedHdsAlignedSpec(ClusteringSpec):
    """The same with centroids in the feature space that all sites share."""

    summary = "fedhds with centroids in a space that all sites share"
    shared_space = True

    name: Literal["fedhds-aligned"] = "fedhds-aligned"
