"""How updates become the next global adapter: one file per rule, one interface."""

from fedhds_server.aggregation.base import Aggregator, Update, validate_update
from fedhds_server.aggregation.fedavg import FedAvg

AGGREGATORS: dict[str, Aggregator] = {"fedavg": FedAvg()}

__all__ = ["AGGREGATORS", "Aggregator", "Update", "validate_update"]
