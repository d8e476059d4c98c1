"""What all sites of a process share: the loaded base model, its adapter and the files fetched for it."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedhds.adapter import AdapterManifest, Artifact
from fedhds.errors import AdapterError, StorageError, TaskError
from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.coreset import coreset_rows
from fedhds_client.link import CoordinatorLink, file_key
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site

if TYPE_CHECKING:
    from fedhds_client.modeling import AdapterModel
    from fedhds_client.prompts import Prompter

logger = logging.getLogger(__name__)


class Control(Protocol):
    """How a computation reports its progress and learns that it is to stop."""

    def report(self, share: float) -> None:
        """Notes the share that is done, 0 to 1."""

    def cancelled(self) -> bool:
        """Whether the computation is to stop."""


@dataclass(frozen=True)
class Trained:
    """A finished update on disk, kept until the coordinator has it: a restart uploads it instead of training again."""

    path: Path
    artifact: Artifact
    samples: int
    loss: float
    seconds: float
    truncated: int

    def result(self) -> pb.TrainResult:
        """The wire message."""
        return pb.TrainResult(
            update=self.artifact.to_proto(),
            samples=self.samples,
            loss=self.loss,
            train_s=self.seconds,
            truncated_rows=self.truncated,
        )

    @property
    def facts(self) -> str:
        """All but the tensors, as JSON."""
        return json.dumps(
            {
                "digest": self.artifact.digest,
                "size": self.artifact.size,
                "samples": self.samples,
                "loss": self.loss,
                "seconds": self.seconds,
                "truncated": self.truncated,
            }
        )

    @classmethod
    def found(cls, path: Path) -> Trained | None:
        """The update that an earlier process finished at `path`; None when there is none, or it is damaged."""
        note = path.with_suffix(".json")
        if not path.exists() or not note.exists():
            return None
        facts = json.loads(note.read_text(encoding="utf-8"))
        artifact = Artifact(facts.pop("digest"), facts.pop("size"))
        return cls(path=path, artifact=artifact, **facts) if Artifact.of_file(path) == artifact else None
