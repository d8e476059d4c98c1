"""The coordinator's half of selection: one file per strategy, one interface."""

from fedhds_server.selection.base import Group, InterClientSelection, Report, Selection, SelectionContext
from fedhds_server.selection.federated_lloyd import Global
from fedhds_server.selection.fedhds import FedHds
from fedhds_server.selection.full import Full
from fedhds_server.selection.random import Random

STRATEGIES: dict[str, InterClientSelection] = {
    "full": Full(),
    "random": Random(),
    "fedhds": FedHds(),
    "fedhds-aligned": FedHds(),
    "global": Global(),
}

__all__ = ["STRATEGIES", "Group", "InterClientSelection", "Report", "Selection", "SelectionContext"]
