"""What a site can be asked to do: one file per kind of task, one interface.

A new kind is a file here and its entry below; the coordinator's workflow has the same kind.
"""

from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult
from fedhds_client.tasks.evaluate import EvaluateTask
from fedhds_client.tasks.select import SelectTask
from fedhds_client.tasks.train import TrainTask

TASKS: dict[str, SiteTask] = {"select": SelectTask(), "train": TrainTask(), "evaluate": EvaluateTask()}

__all__ = ["TASKS", "SiteTask", "TaskContext", "TaskResult"]
