"""How updates become the next global adapter: one interface, and the pipeline around it.

A new rule is a file with an `Aggregator`, its entry here, and its parameters in `fedhds.spec.aggregation`.
"""

from fedhds_server.aggregation.base import Aggregator, Update
from fedhds_server.aggregation.fedavg import FedAvg
from fedhds_server.aggregation.one_factor import Alternating, Ffa
from fedhds_server.aggregation.pipeline import aggregate
from fedhds_server.aggregation.svd import Svd

AGGREGATORS: dict[str, Aggregator] = {
    "fedavg": FedAvg(),
    "alternating": Alternating(),
    "ffa": Ffa(),
    "svd": Svd(),
}

__all__ = ["AGGREGATORS", "Aggregator", "Update", "aggregate"]
