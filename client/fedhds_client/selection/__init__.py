"""Intra-client selection: one file per strategy that reports, and the one place that knows them all."""

from __future__ import annotations

from fedhds.errors import TaskError
from fedhds.runspec import Strategy
from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.federated_lloyd import Global
from fedhds_client.selection.fedhds import FedHds

__all__ = ["REPORTING", "IntraClientSelection", "SelectionContext", "selection_of"]

REPORTING: dict[Strategy, IntraClientSelection] = {
    "fedhds": FedHds(aligned=False),
    "fedhds-aligned": FedHds(aligned=True),
    "global": Global(),
}


def selection_of(strategy: Strategy) -> IntraClientSelection:
    """The strategy of a select task; raises TaskError for one that reports nothing ("full", "random")."""
    if strategy not in REPORTING:
        raise TaskError(f"the strategy {strategy} reports no clusters, so none are released")
    return REPORTING[strategy]
