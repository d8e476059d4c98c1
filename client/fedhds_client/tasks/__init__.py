"""What a site can be asked to do: one file per kind of task, one interface.

A new kind is a file here and its entry below; the coordinator's workflow has the same kind.
"""

from fedhds import __version__
from fedhds.errors import TaskError
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult
from fedhds_client.tasks.evaluate import EvaluateTask, ValidateTask
from fedhds_client.tasks.secure_train import SecureTrainTask
from fedhds_client.tasks.select import SelectTask
from fedhds_client.tasks.train import TrainTask

TASKS: dict[str, SiteTask] = {
    "select": SelectTask(),
    "train": TrainTask(),
    "secure-train": SecureTrainTask(),
    "evaluate": EvaluateTask(),
    "validate": ValidateTask(),
}

__all__ = ["TASKS", "SiteTask", "TaskContext", "TaskResult", "task_kind"]


def task_kind(name: str) -> SiteTask:
    """The kind of task with that name; raises TaskError for one that this version does not know."""
    if name not in TASKS:
        raise TaskError(f"fedhds {__version__} knows no task {name!r}; install the coordinator's version here")
    return TASKS[name]
