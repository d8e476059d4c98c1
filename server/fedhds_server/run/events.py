"""What the state machine hears and what it asks for: events and instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message

from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_server.run.secure_round import SecureRound
from fedhds_server.run.state import UpdateScore

# Outcomes: what a workflow makes of a closed stage.


@dataclass(frozen=True, slots=True)
class NextStep:
    """The sites that answered get another task of the same workflow, with this request.

    `artifact` is what the request stands for, if it is too long for the state; `secure` what a secure round has fixed.
    """

    request: Message
    artifact: Artifact | None = None
    secure: SecureRound | None = None
    sites: tuple[str, ...] | None = None
    """Those of them that get it; None: all."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """Rows that the steps before have left each site; absent: all that it declared."""


@dataclass(frozen=True, slots=True)
class CoresetsSelected:
    """The rows that train; sites without a coreset do not."""

    coresets: Mapping[str, selection_pb2.Coreset]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundReport:
    """What is known of a round's updates besides their result, as `ClosedRound` keeps it; and lines for people."""

    product_gap: float | None = None
    updates: Mapping[str, UpdateScore] = field(default_factory=dict)
    unchanged: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterUpdated:
    """The next global adapter and the server optimizer's slots are durable."""

    adapter: Artifact
    slots: Mapping[str, Artifact] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Sites whose update was left out, as its bytes are no longer those that were accepted or it is too far away; and
    what is wrong."""
    report: RoundReport = RoundReport()
    results: Mapping[str, pb.TrainResult] | None = None
    """What is known of the sites in the sum, where the stage's replies do not say it."""


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """The round ends without a result, and the adapter stays as it is."""

    reason: str


Outcome = NextStep | CoresetsSelected | AdapterUpdated | RoundAbandoned


# Events: what happened. `at` is wall time in seconds, given by the caller of the machine.


@dataclass(frozen=True, slots=True)
class SiteConnected:
    """A site took its name (checked by membership.admit before)."""

    site: str
    key: str
    session: str
    serial: str = ""


@dataclass(frozen=True, slots=True)
class SiteRegistered:
    """A site proved its base model and declared what it brings (checked by membership.check_registration before)."""

    at: float
    site: str
    rows: int
    evaluates: bool
    fingerprint: dict[str, str]
    manifest: AdapterManifest
    evaluation_rows: int = 0
    validation_rows: int = 0
    first_values: Artifact | None = None
    """What the site uploaded of them, checked with the manifest."""


@dataclass(frozen=True, slots=True)
class SiteSilent:
    """No sign of life for longer than the heartbeat time-out."""

    at: float
    site: str


@dataclass(frozen=True, slots=True)
class SiteHeard:
    """A lost site gave a sign of life in its old session."""

    at: float
    site: str


@dataclass(frozen=True, slots=True)
class SiteLeft:
    """A site ended its session, or was refused for `reason`."""

    at: float
    site: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SiteEvicted:
    """An operator excluded a party for good."""

    at: float
    site: str
    """A site's name, or the fingerprint of a key."""
    reason: str


@dataclass(frozen=True, slots=True)
class SiteRevoked:
    """The operator's lists let a site in no more; they may do so again."""

    at: float
    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelConfirmed:
    """An operator said which base model it is (checked by base_model.check_confirmation before)."""

    at: float
    fingerprint: str
    """Over all parts, as fedhds.fingerprint.combined gives it."""
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterDrawn:
    """The initial adapter is durable."""

    at: float
    adapter: Artifact


@dataclass(frozen=True, slots=True)
class ResultReceived:
    """A task's result (checked by rpc.validation before); `artifact` is the durable upload that it names."""

    at: float
    task_id: str
    result: Any
    artifact: Artifact | None = None


@dataclass(frozen=True, slots=True)
class ResultRejected:
    """A task's result did not pass validation."""

    at: float
    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task failed at its site."""

    at: float
    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class StageResolved:
    """What the workflow of the closed stage `stage` made of it."""

    at: float
    stage: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The open stage, named by `stage`, has been open for as long as the run allows."""

    at: float
    stage: str


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The open stage, named by `stage`, has been short of its quorum for one heartbeat time-out."""

    at: float
    stage: str


@dataclass(frozen=True, slots=True)
class RunPaused:
    """An operator wants no new task handed out."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunResumed:
    """An operator ended the pause."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunRolledBack:
    """An operator takes the run back to the adapter of an earlier round (checked by rollback.target before)."""

    at: float
    round_number: int
    reason: str


@dataclass(frozen=True, slots=True)
class RunStopped:
    """An operator ends the run with the adapter as it is."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run cannot go on: what is at fault, a strategy for example, would fail at every further try."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class FinalDelivered:
    """A site has the final adapter."""

    site: str


Event = (
    SiteConnected
    | SiteRegistered
    | SiteSilent
    | SiteHeard
    | SiteLeft
    | SiteEvicted
    | SiteRevoked
    | ModelConfirmed
    | AdapterDrawn
    | ResultReceived
    | ResultRejected
    | TaskFailed
    | StageResolved
    | DeadlineReached
    | RetryDue
    | RunPaused
    | RunResumed
    | RunRolledBack
    | RunStopped
    | RunFailed
    | FinalDelivered
)


# Instructions: what the shell should do. All can be repeated; RunMachine.pending gives those that a crash cut short.


@dataclass(frozen=True, slots=True)
class DrawAdapter:
    """Make the initial adapter of the seed and of what a site sent of it; answer with AdapterDrawn."""


@dataclass(frozen=True, slots=True)
class Resolve:
    """Have the workflow of the closed stage `stage` decide what follows; answer with StageResolved."""

    stage: str


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Write the PEFT folders of the last and of the best global adapter with their cards, and drop artifacts that
    nothing names.
    """


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete an artifact that no longer counts, and what is held of its upload by `owner`."""

    artifact: Artifact
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Wake:
    """Answer the long polls: somebody's work has changed."""


@dataclass(frozen=True, slots=True)
class Record:
    """Write a line for people into the journal and the log."""

    message: str
    trouble: bool = False


Instruction = DrawAdapter | Resolve | WriteCheckpoint | Discard | Wake | Record
