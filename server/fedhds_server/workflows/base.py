"""The interfaces of task kinds and workflows: what results mean, and what follows a closed stage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from fedhds.errors import RequestError
from fedhds.tensors.artifact import Artifact

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import Message

    from fedhds.secure.masks import MaskStream
    from fedhds_server.run.events import AdapterUpdated, Instruction, Outcome, ResultReceived, RoundAbandoned
    from fedhds_server.run.state import RunState, Stage, Task
    from fedhds_server.selection.base import Selection


Load = Callable[[Artifact], bytes]
"""The bytes of an artifact; raises DamagedArtifact."""

MAX_SMALL_RESULT = 1 << 16
"""Bytes of a result that has counts and names, but no values for each row or cluster."""


class Workspace(Protocol):
    """What a workflow may do outside the state while it resolves a stage; the coordinator implements it."""

    def verified(self, artifact: Artifact) -> Path:
        """A local file with the artifact's bytes; raises DamagedArtifact."""

    def keep(self, content: bytes) -> Artifact:
        """Makes bytes a durable artifact; raises StorageError."""

    def record_selection(self, round_number: int, selection: Selection) -> None:
        """Keeps a selection for people, as selection-N.json; raises StorageError."""

    def aggregate(self, state: RunState, stage: Stage) -> AdapterUpdated:
        """Combines the stage's updates into the next global adapter, durably; raises StorageError."""

    def add_masked(self, updates: Sequence[Artifact]) -> Artifact:
        """The sum of masked updates, durably; raises StorageError, DamagedArtifact."""

    def unmask(self, state: RunState, stage: Stage, masks: Sequence[MaskStream]) -> AdapterUpdated | RoundAbandoned:
        """The next global adapter from the stage's sum, once `masks` are applied, durably; raises StorageError.

        Abandoned is a sum that no honest sites give.
        """


class TaskKind(ABC):
    """The tasks of one kind. All methods run on the event loop and MUST be pure and quick."""

    kind: ClassVar[str]
    """Of its tasks; the site's executor has the same name."""
    masked: ClassVar[bool] = False
    """Whether its uploads are masked values, of which nothing but the size can be checked."""

    @abstractmethod
    def request(self, state: RunState, task: Task) -> Message | Any | None:
        """What a task's site gets besides the adapter."""

    def adapter(self, state: RunState, task: Task) -> Artifact:
        """The global adapter that a task starts from: the newest one."""
        return state.adapter

    def result_limit(self, state: RunState, site: str) -> int:
        """Bytes of the longest result that a task of `site` can have."""
        return MAX_SMALL_RESULT

    def upload_sizes(self, state: RunState, task: Task) -> range:
        """Sizes in bytes that the upload of a task's result may have; empty: it has none."""
        return range(0)

    def upload_of(self, result: Any) -> Artifact | None:
        """The uploaded update that a result names; raises ArtifactError for a reference that is none."""
        return None

    @abstractmethod
    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        """Why a result cannot count: (what is wrong, for metrics; why, for people); None when it can.

        Raises RequestError for a message of another kind.
        """

    def check_long(self, state: RunState, task: Task, result: Any, load: Load) -> tuple[str, str] | None:
        """As `check`, for a result that came as an artifact; runs in a thread, and may `load` other artifacts.

        Raises RequestError too where the kind has no long results.
        """
        raise RequestError(f"a {self.kind} task has no result that is too long for a call")

    @abstractmethod
    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        """Puts a checked result into the state."""


class Workflow(TaskKind):
    """Tasks that are given out in stages.

    `resolve` runs in a thread, may compute for minutes, and MUST depend on nothing but its arguments, so that a crash
    can repeat it.
    """

    collecting: ClassVar[str]
    """The run's activity while a stage collects results."""
    resolving: ClassVar[str]
    """The run's activity while a closed stage is resolved."""
    answers: ClassVar[str]
    """What sites send, for messages: "reports"."""
    closes_at_target: ClassVar[bool] = False
    """Whether a stage closes as soon as its target is reached, though other sites still work."""

    abandons: ClassVar[bool] = False
    """Whether a stage closes when its quorum is out of reach, and the round ends without a result."""

    def quorum(self, state: RunState, stage: Stage) -> int:
        """Fewest answers with which a stage can close, of parties or, where they count `by_site`, of sites."""
        return state.spec.rounds.quorum_of(stage.target)

    def by_site(self, stage: Stage) -> bool:
        """Whether every site counts by itself, and no other one can take its place."""
        return False

    @abstractmethod
    def title(self, state: RunState, stage: Stage) -> str:
        """Names an open stage for people."""

    @abstractmethod
    def closing(self, state: RunState, stage: Stage) -> str:
        """Says for people what happens with a closed stage."""

    @abstractmethod
    def resolver(self, state: RunState) -> str:
        """Names for people what decides on a closed stage: "the selection strategy fedhds"."""

    @abstractmethod
    def replaceable(self, state: RunState, stage: Stage) -> bool:
        """Whether a site that was not asked before can take the place of one that is disconnected."""

    @abstractmethod
    def resolve(self, state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
        """What follows a closed stage; nothing of the stage changes meanwhile."""
