"""FedHDS (arXiv 2410.10926): sites cluster their rows, the coordinator clusters the sites' centroids."""

from __future__ import annotations

from typing import Literal

from fedhds.settings import parameter
from fedhds.spec.amounts import MAX_COUNT
from fedhds.spec.strategies.base import StrategySpec

Reduction = Literal["tsne", "umap", "pca", "kpca", "none"]


class ClusteringSpec(StrategySpec):
    """The parameters of clustering at a site, shared by both variants of FedHDS."""

    privacy_unit = "client"
    released = "cluster centroids"

    reduction: Reduction = parameter("tsne", "Reduction of the features before a site clusters them.")
    min_cluster_size: int = parameter(2, "Smallest cluster at a site, in rows.", ge=2, le=MAX_COUNT)


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
