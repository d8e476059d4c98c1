"""Who hears what a run does: one file each, one interface. A new observer is a file and its entry here."""

from fedhds_server.observers.base import ObserverContext, RunObserver
from fedhds_server.observers.metrics_file import MetricsFile
from fedhds_server.observers.mlflow import MLflow
from fedhds_server.observers.tensorboard import TensorBoard
from fedhds_server.observers.tracker import Tracker
from fedhds_server.observers.wandb import WandB

# Made once for each coordinator that leads, with the run folder.
OBSERVERS: dict[str, type[RunObserver]] = {"metrics-file": MetricsFile}
# The same for those that --track names; each name is also that of the extra that brings its package.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}

__all__ = ["OBSERVERS", "TRACKERS", "ObserverContext", "RunObserver", "Tracker"]
