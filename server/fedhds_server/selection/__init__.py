"""The coordinator's half of selection: one file per strategy, one interface.

A new strategy is a file here, one in `fedhds.spec.strategies` and, if sites report, one in
`fedhds_client.selection`, each with its entry in the registry of its folder.
"""

from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.federated_kmeans import FederatedKMeans
from fedhds_server.selection.fedhds import FedHds
from fedhds_server.selection.full import Full
from fedhds_server.selection.random import Random
from fedhds_server.selection.target import Target

STRATEGIES: dict[str, InterClientSelection] = {
    "full": Full(),
    "random": Random(),
    "fedhds": FedHds(),
    "fedhds-aligned": FedHds(),
    "federated-kmeans": FederatedKMeans(),
    "target-features": Target(),
    "target-gradients": Target(),
}

__all__ = ["STRATEGIES", "Group", "InterClientSelection", "Report", "Selection", "SelectionContext"]
