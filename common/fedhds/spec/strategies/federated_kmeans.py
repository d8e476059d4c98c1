"""k-means over the rows of all sites, from sums and counts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fedhds.kmeans import total_passes
from fedhds.settings import parameter
from fedhds.spec.strategies.grouping import GroupingSpec

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from fedhds.spec.run import RunSpec


class FederatedKMeansSpec(GroupingSpec):
    """The coordinator sends centers, each site answers with sums and counts, pass after pass."""

    summary = "k-means over the rows of all sites, from sums and counts per center"
    shared_space = True
    privacy_unit = "example"
    pick_change = "one"
    released = "sums and counts over clusters of features"
    clipped_and_noised = "Rows' features were clipped to L2 norm {clip_norm:g} and their sums and counts noised"

    name: Literal["federated-kmeans"] = "federated-kmeans"
    kmeans_iterations: int = parameter(5, "Passes over all sites with the full number of centers.", ge=1, le=100)

    @property
    def request_type(self) -> type[Message]:
        from fedhds.v2.selection_pb2 import KMeansCenters

        return KMeansCenters

    @property
    def report_type(self) -> type[Message]:
        from fedhds.v2.selection_pb2 import KMeansStats

        return KMeansStats

    def releases(self, spec: RunSpec) -> int:
        return total_passes(spec.privacy.selection.released_centroids, self.kmeans_iterations)
