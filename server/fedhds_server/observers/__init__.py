"""Who hears what a run does: one file each, one interface. A new observer is a file and its entry here."""

from fedhds_server.observers.base import ObserverContext, RunObserver
from fedhds_server.observers.metrics_file import MetricsFile

# Made once for each coordinator that leads, with the run folder.
OBSERVERS: dict[str, type[RunObserver]] = {"metrics-file": MetricsFile}

__all__ = ["OBSERVERS", "ObserverContext", "RunObserver"]
