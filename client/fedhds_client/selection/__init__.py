"""Intra-client selection: one file per strategy that reports, one interface.

A new strategy is a file here with an `IntraClientSelection` and its entry below, beside its specification in
`fedhds.spec.strategies` and its coordinator's half in `fedhds_server.selection`.
"""

from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.federated_kmeans import FederatedKMeans
from fedhds_client.selection.fedhds import FedHds
from fedhds_client.selection.target import Target

# Strategies whose coresets need nothing of the rows themselves have no half at the site.
STRATEGIES: dict[str, IntraClientSelection] = {
    "fedhds": FedHds(),
    "fedhds-aligned": FedHds(),
    "federated-kmeans": FederatedKMeans(),
    "target-features": Target(),
    "target-gradients": Target(),
}

__all__ = ["STRATEGIES", "IntraClientSelection", "SelectionContext"]
