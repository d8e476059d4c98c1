"""What the coordinator remembers of a run."""

from __future__ import annotations

import base64
import functools
import hashlib
from enum import StrEnum
from typing import TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from pydantic import BaseModel, ConfigDict, Field

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_server.run.parties import party_of
from fedhds_server.run.secure_round import SecureRound

MessageType = TypeVar("MessageType", bound=Message)


class Phase(StrEnum):
    """Where a run stands."""

    ENROLLING = "enrolling"
    RUNNING = "running"  # stage after stage; `RunState.activity` says which
    FINISHING = "finishing"  # waits for the last evaluations
    COMPLETED = "completed"
    STOPPED = "stopped"  # by an operator
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self in (Phase.COMPLETED, Phase.STOPPED, Phase.FAILED)


class SiteState(StrEnum):
    """How the coordinator sees a site."""

    CONNECTING = "connecting"  # has its name, has not yet proved its base model
    ENROLLED = "enrolled"
    LOST = "lost"  # silent for longer than the heartbeat time-out; may come back
    LEFT = "left"  # said so, or was refused
    EVICTED = "evicted"  # by an operator; never comes back


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=False)


class Rejection(_Record):
    """A result that did not pass validation."""

    task_id: str
    reason: str


class Site(_Record):
    """One site, by the name that its certificate or its flag gives it."""

    name: str
    key: str = ""  # SHA-256 of the certificate's public key; empty without TLS
    serial: str = ""  # of the certificate that it enrolled with, in hexadecimal digits
    session: str = ""  # SHA-256 of the session's secret; empty when an operator ended it
    state: SiteState = SiteState.CONNECTING
    rows: int = 0
    evaluates: bool = False
    evaluation_rows: int = 0  # held-out rows that it declared; 0 for one that registered before these were
    validation_rows: int = 0  # rows that validate; 0: it validates none
    last_error: str = ""
    last_accepted: str = ""  # task whose result was accepted last: a site whose answer was lost asks again
    last_result: str = ""  # tells that result from another of the same task; empty for one before this was kept
    last_rejected: Rejection | None = None  # as above, of results that did not pass
    delivered: bool = False
    bytes_received: int = 0
    rejections: int = 0  # results that did not pass validation
    quarantined: bool = False  # after repeated rejections of its party: gets no more work

    @property
    def party(self) -> str:
        """The party that it belongs to."""
        return party_of(self.name)

    @property
    def registered(self) -> bool:
        """Whether it has declared what it brings, and so has the run's base model."""
        return self.rows > 0 or self.evaluates or self.validates

    @property
    def validates(self) -> bool:
        """Whether it holds rows that choose the best round."""
        return self.validation_rows > 0

    @property
    def excluded(self) -> bool:
        """Whether the run takes no rows of this site any more."""
        return self.quarantined or self.state is SiteState.EVICTED

    @property
    def live(self) -> bool:
        """Whether the site has its name now."""
        return self.state in (SiteState.CONNECTING, SiteState.ENROLLED)

    @property
    def trains(self) -> bool:
        """Whether the site can be asked for rows now.

        A site that has just restarted keeps its name and its rows while it loads its model, and is drawn all the same:
        otherwise a crash would decide who takes part.
        """
        return self.live and self.rows > 0 and not self.excluded


class Task(_Record):
    """One open piece of work; it stays open until it is completed, failed or withdrawn."""

    id: str
    kind: str
    round_number: int
    site: str


class Reply(_Record):
    """What is kept of a site's accepted result in the open stage."""

    task_id: str
    message: str = ""  # packed; what its workflow needs of the result
    artifact: Artifact | None = None  # the upload that the result names
    long: bool = False  # the artifact is the result itself, which is too long for this row
    empty: bool = False  # the site had nothing to give


class Stage(_Record):
    """The open step of a run: one task for each site of a cohort, and what came of it."""

    kind: str  # of its tasks, and of the workflow that they belong to
    round_number: int
    step: int = 0  # steps of the same workflow before it
    digest: str = ""  # of the request: an answer to another question must not count
    request: str = ""  # packed; what every site gets with its task
    request_artifact: Artifact | None = None  # what the request stands for, where it is too long for this row
    cohort: list[str] = Field(default_factory=list)
    target: int = 0  # parties whose answers close it at once
    replies: dict[str, Reply] = Field(default_factory=dict)
    totals: str = ""  # packed; what the replies add up to, where the workflow adds them up as they arrive
    failed: list[str] = Field(default_factory=list)  # sites whose task failed or whose result was rejected
    rows: dict[str, int] = Field(default_factory=dict)  # that earlier steps left a site, where they left some out
    deadline_reached: bool = False
    closed: bool = False  # enough has come; its workflow decides what follows
    secure: SecureRound | None = None  # what earlier steps of a round under secure aggregation have fixed

    @property
    def name(self) -> str:
        """Names the stage, so that an event about it cannot hit the next."""
        return f"{self.kind}/{self.round_number}" + (f".{self.step}-{self.digest}" if self.step else "")

    @property
    def uploads(self) -> list[Artifact]:
        """The updates in the artifact store, one for each site that made one."""
        return [reply.artifact for reply in self.replies.values() if reply.artifact and not reply.long]

    @property
    def artifacts(self) -> list[Artifact]:
        """All that the stage needs of the artifact store."""
        named = [self.request_artifact, *(reply.artifact for reply in self.replies.values())]
        return [*(artifact for artifact in named if artifact), *(self.secure.artifacts if self.secure else [])]

    def task_id(self, site: str) -> str:
        """The id of a site's task: the same for the same question."""
        return f"{self.name}/{site}"


class UpdateScore(_Record):
    """How an update compares with the others of its round."""

    norm: float  # of its difference to the round's adapter, before it was bounded
    distance: float | None = None  # its median distance to the others, over the median of these
    cosine: float | None = None  # with what the others change together


class ClosedRound(_Record):
    """What came of a round."""

    round_number: int
    cohort: list[str]
    contributions: dict[str, int]  # site -> rows trained on
    loss: float | None  # None: no contributor said its own
    seconds: float
    bytes_received: int = 0  # of the updates that came in time
    tokens_per_s: float = 0.0  # that the sites trained on, added up; of those that said so
    product_gap: float | None = None  # from the mean of LoRA's products, where both factors are averaged
    updates: dict[str, UpdateScore] = Field(default_factory=dict)  # by site, of those that counted
    unchanged: str = ""  # why the global adapter is not the round's result

    @property
    def samples(self) -> int:
        """Rows trained on, over all contributors."""
        return sum(self.contributions.values())


class MetricSum(_Record):
    """A metric, summed over what it is a mean of; adds up in any order."""

    value_sum: float
    weight: float


class Evaluation(_Record):
    """One evaluator's sums over its held-out rows."""

    rows: int
    metrics: dict[str, MetricSum]


class RunState(_Record):
    """All that survives a crash, as one row. Task ids, cohorts and first values follow from it and the seed."""

    run_id: str
    spec: RunSpec
    phase: Phase = Phase.ENROLLING
    message: str = ""  # for operators: it names sites
    end_message: str = ""  # why the run ended, for everybody
    round_number: int = 0
    round_size: int = 0  # parties in the open round's cohort before over-selection
    started_at: float = 0.0
    round_opened_at: float = 0.0
    ended_at: float = 0.0
    fingerprint: dict[str, str] = Field(default_factory=dict)
    model_given_by: str = ""  # the site whose registration fixed fingerprint and manifest
    expected_fingerprint: str = ""  # over all parts, by the operator's word; empty while nobody has confirmed one
    evicted: dict[str, str] = Field(default_factory=dict)  # name of a party, or fingerprint of a key -> why
    manifest: str = ""  # packed; empty until the first site registers
    sites: dict[str, Site] = Field(default_factory=dict)
    tasks: dict[str, Task] = Field(default_factory=dict)
    stage: Stage | None = None
    coresets: dict[str, str] = Field(default_factory=dict)  # site -> its packed coreset, of the last selection
    paused: str | None = None  # the reason, while an operator's pause lasts
    adapters: dict[int, Artifact] = Field(default_factory=dict)  # global adapters kept, by round
    first_values: Artifact | None = None  # tensors of the first adapter that follow from the base model, once sent
    slots: dict[str, Artifact] = Field(default_factory=dict)  # of the server optimizer
    slots_at: dict[int, dict[str, Artifact]] = Field(default_factory=dict)  # after earlier rounds whose adapter is kept
    closed_rounds: list[ClosedRound] = Field(default_factory=list)
    evaluations: dict[int, dict[str, Evaluation]] = Field(default_factory=dict)  # round -> evaluator -> sums
    failed_evaluations: list[str] = Field(default_factory=list)  # tasks that failed after the last round, for good
    validations: dict[int, dict[str, Evaluation]] = Field(default_factory=dict)  # round -> validating site -> sums
    validated_round: int = -1  # all rounds up to it are validated, or nobody could
    best_round: int | None = None  # the lowest validation loss so far; None while no site has validated
    improved_round: int | None = None  # the last one that was better by more than early stopping asks

    @property
    def adapter(self) -> Artifact:
        """The newest global adapter; raises ValueError before the first."""
        return self.adapters[max(self.adapters)]

    @property
    def delivered_round(self) -> int:
        """The round whose adapter sites get; raises ValueError before the first."""
        best = self.best_round if self.spec.evaluation.deliver == "best" else None
        return max(self.adapters) if best is None else best

    @property
    def artifacts(self) -> set[Artifact]:
        """Everything that the run still needs from the artifact store."""
        stage = self.stage.artifacts if self.stage else ()
        first = [self.first_values] if self.first_values else []
        slots = [slot for slots in (self.slots, *self.slots_at.values()) for slot in slots.values()]
        return {*self.adapters.values(), *slots, *first, *stage}

    @property
    def needs_first_values(self) -> bool:
        """Whether the initial adapter waits for the values that follow from the base model."""
        return bool(self.manifest and not self.first_values and self.adapter_manifest.from_base.tensors)

    @property
    def downloads(self) -> set[Artifact]:
        """What sites may fetch: the global adapters, and what the open stage asks."""
        request = self.stage.request_artifact if self.stage else None
        single = self.stage.secure.requests.values() if self.stage and self.stage.secure else ()
        return {*self.adapters.values(), *([request] if request else []), *single}

    def needs(self, artifact: Artifact) -> bool:
        """Whether the run needs the bytes of this digest, whatever size a site claims for them."""
        return artifact.digest in {needed.digest for needed in self.artifacts}

    @property
    def pool_rows(self) -> int:
        """Training rows that all sites declared."""
        return sum(site.rows for site in self.sites.values())

    def sites_of(self, party: str) -> list[Site]:
        """All sites that a party ever enrolled."""
        return [site for site in self.sites.values() if site.party == party]

    @property
    def trainers(self) -> list[str]:
        """Sites that can be asked for rows now, by name."""
        return sorted(site.name for site in self.sites.values() if site.trains)

    @property
    def evaluators(self) -> list[str]:
        """Sites that evaluate now, by name."""
        sites = self.sites.values()
        return sorted(
            site.name for site in sites if site.state is SiteState.ENROLLED and site.evaluates and not site.excluded
        )

    @property
    def validators(self) -> list[str]:
        """Sites that validate, by name: also those that load their model, or a restart would decide who counts."""
        sites = self.sites.values()
        return sorted(site.name for site in sites if site.live and site.validates and not site.excluded)

    @property
    def trained_rows(self) -> int:
        """Distinct rows trained on: exact for one-shot selection, where a site's rows stay; else an upper bound."""
        per_site: dict[str, list[int]] = {}
        for closed in self.closed_rounds:
            for site, samples in closed.contributions.items():
                per_site.setdefault(site, []).append(samples)
        if self.spec.selection.one_shot:
            return sum(max(samples) for samples in per_site.values())
        return sum(min(self.sites[site].rows, sum(samples)) for site, samples in per_site.items())

    @property
    def adapter_manifest(self) -> AdapterManifest:
        """The manifest that the first site's registration fixed; raises ValueError before that."""
        if not self.manifest:
            raise ValueError("no site has registered yet")
        return _manifest(self.manifest)

    def coreset_of(self, site: str) -> selection_pb2.Coreset:
        """The rows that `site` trains on by the last selection."""
        return unpacked(self.coresets[site], selection_pb2.Coreset)


@functools.lru_cache(maxsize=1)
def _manifest(text: str) -> AdapterManifest:
    # Every task that is handed out asks for it, and that of a large model takes milliseconds to read.
    return AdapterManifest.from_proto(unpacked(text, pb.AdapterManifest))


def result_digest(result: Any, artifact: Artifact | None) -> str:
    """Tells a task's result from another one: SHA-256 of the upload that it names, or else of its bytes."""
    return artifact.digest if artifact else hashlib.sha256(result.value).hexdigest()


def packed(message: Message | Any) -> str:
    """A message with its type as text for the state's row; the same message gives the same text."""
    if not isinstance(message, Any):
        content, message = message, Any()
        message.Pack(content, deterministic=True)
    return base64.b64encode(message.SerializeToString(deterministic=True)).decode()


def unpacked_any(text: str) -> Any:
    """The message behind `packed`, still with its type."""
    return Any.FromString(base64.b64decode(text))


def unpacked(text: str, kind: type[MessageType]) -> MessageType:
    """The message behind `packed`; raises ValueError when it is of another kind."""
    message = kind()
    if not unpacked_any(text).Unpack(message):
        raise ValueError(f"the state holds a {unpacked_any(text).TypeName()} where a {kind.__name__} belongs")
    return message
