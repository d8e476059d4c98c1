"""The interface of a site's tasks: what they get, and what they give back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from google.protobuf.message import Message

from fedhds_client.incoming import unpacked

if TYPE_CHECKING:
    from fedhds.v2 import federation_pb2 as pb
    from fedhds_client.computation import Control
    from fedhds_client.executor import RunModels
    from fedhds_client.settings import ClientSettings
    from fedhds_client.site import Site
    from fedhds_client.tasks.secure_train import MaskedFile
    from fedhds_client.updates.update import FinishedUpdate

MessageType = TypeVar("MessageType", bound=Message)


@dataclass(frozen=True)
class TaskContext:
    """One task of one site, in the process's worker thread."""

    task: pb.Task
    run_id: str
    site: Site
    index: int
    """Of the site among those of the process."""
    settings: ClientSettings
    models: RunModels
    adapter: Path
    """The global adapter on this machine's disk."""
    control: Control

    def request(self, kind: type[MessageType]) -> MessageType:
        """The task's request; raises TaskError when it is of another type."""
        return unpacked(self.task.request, kind, task=self.task.kind)


@dataclass(frozen=True)
class TaskResult:
    """What the coordinator gets: a message, and the file that it names, if any."""

    message: Message
    update: FinishedUpdate | MaskedFile | None = None


class SiteTask(ABC):
    """One kind of task."""

    doing: ClassVar[str]
    """For progress: "training"."""

    @abstractmethod
    def run(self, context: TaskContext) -> TaskResult:
        """Does the task.

        Raises Cancelled when `context.control` says so, TaskError and what else fedhds raises when it cannot be done
        here.
        """
