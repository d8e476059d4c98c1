"""What the state machine hears and what it asks for: events and instructions."""

from __future__ import annotations

from dataclasses import dataclass

from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.state import Evaluation

# Events: what happened. `at` is wall time in seconds, given by whoever feeds the machine.


@dataclass(frozen=True, slots=True)
class SiteConnected:
    """A site took its name (checked by enrolment.admit before)."""

    site: str
    key: str
    session: str


@dataclass(frozen=True, slots=True)
class SiteAttested:
    """A site showed its base model and declared what it brings (checked by enrolment.check_attestation before)."""

    at: float
    site: str
    rows: int
    evaluates: bool
    fingerprint: dict[str, str]
    manifest: AdapterManifest


@dataclass(frozen=True, slots=True)
class SiteSilent:
    """No sign of life for longer than the patience."""

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
    """An operator excluded a site for good."""

    at: float
    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterDrawn:
    """The initial adapter is durable."""

    at: float
    adapter: Artifact


@dataclass(frozen=True, slots=True)
class ReportReceived:
    """A site's clusters, or its cells (checked by selection.cells.check before)."""

    at: float
    task_id: str
    report: pb.ClusterReport | pb.CellReport


@dataclass(frozen=True, slots=True)
class PassOpened:
    """The strategy wants another pass over the sites that answered the one with the number `done`."""

    at: float
    round: int
    done: int
    centres: pb.Centres


@dataclass(frozen=True, slots=True)
class SelectionMade:
    """The strategy's decision for `round` (0: for all of them): `coresets` holds the sites that train."""

    at: float
    round: int
    coresets: dict[str, pb.Coreset]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UpdateReceived:
    """A validated, durable update."""

    at: float
    task_id: str
    artifact: Artifact
    samples: int
    loss: float


@dataclass(frozen=True, slots=True)
class UpdateDamaged:
    """The bytes of an accepted update are no longer those that were accepted."""

    site: str
    reason: str


@dataclass(frozen=True, slots=True)
class EvaluationReceived:
    """An evaluator's sums."""

    at: float
    task_id: str
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task failed at its site."""

    at: float
    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ResultRejected:
    """A task's result did not pass validation."""

    at: float
    task_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class NothingToGive:
    """A site has, as it should, no row to train on in this round: all its picks fell on padding."""

    at: float
    task_id: str


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The open selection or round, named by `opening`, has been open for as long as the run allows."""

    at: float
    opening: str


@dataclass(frozen=True, slots=True)
class RetryDue:
    """The open selection or round, named by `opening`, has been short of its quorum for one patience."""

    at: float
    opening: str


@dataclass(frozen=True, slots=True)
class RoundAggregated:
    """The round's new global adapter is durable."""

    at: float
    adapter: Artifact


@dataclass(frozen=True, slots=True)
class RunPaused:
    """An operator wants no new task handed out."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunResumed:
    """An operator ended the pause."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunStopped:
    """An operator ends the run with the adapter as it is."""

    at: float
    reason: str


@dataclass(frozen=True, slots=True)
class FinalDelivered:
    """A site has the final adapter."""

    site: str


Event = (
    SiteConnected
    | SiteAttested
    | SiteSilent
    | SiteHeard
    | SiteLeft
    | SiteEvicted
    | AdapterDrawn
    | ReportReceived
    | PassOpened
    | SelectionMade
    | UpdateReceived
    | UpdateDamaged
    | EvaluationReceived
    | TaskFailed
    | ResultRejected
    | NothingToGive
    | DeadlineReached
    | RetryDue
    | RoundAggregated
    | RunPaused
    | RunResumed
    | RunStopped
    | FinalDelivered
)


# Instructions: what the shell is to do. All can be repeated; RunMachine.pending gives those that a crash cut short.


@dataclass(frozen=True, slots=True)
class DrawAdapter:
    """Draw the initial adapter from the seed; answer with AdapterDrawn."""


@dataclass(frozen=True, slots=True)
class Select:
    """Run the strategy over the reports of `sites`; answer with SelectionMade or PassOpened."""

    round: int
    sites: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Fold the open round's updates; answer with RoundAggregated."""

    round: int


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Write the PEFT folder of the last global adapter and its card, and drop artifacts that nothing names."""


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete an update that no longer counts."""

    artifact: Artifact


@dataclass(frozen=True, slots=True)
class Wake:
    """Answer the long polls: somebody's work has changed."""


@dataclass(frozen=True, slots=True)
class Record:
    """Write a line for people into the journal and the log."""

    message: str
    trouble: bool = False


Instruction = DrawAdapter | Select | Aggregate | WriteCheckpoint | Discard | Wake | Record
