"""What the coordinator remembers of a run."""

from __future__ import annotations

import base64
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from fedhds.runspec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v1 import federation_pb2 as pb


class Phase(StrEnum):
    """Where a run stands."""

    ENROLLING = "enrolling"
    SELECTING = "selecting"  # collects reports
    GROUPING = "grouping"  # the strategy works on them
    TRAINING = "training"  # collects updates
    AGGREGATING = "aggregating"
    FINISHING = "finishing"
    COMPLETED = "completed"
    STOPPED = "stopped"  # by an operator
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self in (Phase.COMPLETED, Phase.STOPPED, Phase.FAILED)


class SiteState(StrEnum):
    """How the coordinator sees a site."""

    CONNECTING = "connecting"  # holds its name, has not yet shown its base model
    ENROLLED = "enrolled"
    LOST = "lost"  # silent for longer than the patience; may come back
    LEFT = "left"  # said so, or was refused
    EVICTED = "evicted"  # by an operator; never comes back


class TaskKind(StrEnum):
    """Kinds of work, in the order in which a site that has several gets them."""

    SELECT = "select"
    TRAIN = "train"
    EVALUATE = "evaluate"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=False)


class Site(_Record):
    """One site, by the name that its certificate or its flag gives it."""

    name: str
    key: str = ""  # SHA-256 of the certificate's public key; empty without TLS
    session: str = ""  # SHA-256 of the session's secret
    state: SiteState = SiteState.CONNECTING
    rows: int = 0
    evaluates: bool = False
    last_error: str = ""
    delivered: bool = False
    bytes_received: int = 0
    rejections: int = 0  # results that did not pass validation
    quarantined: bool = False  # after repeated rejections: gets no more work that changes the adapter

    @property
    def shut_out(self) -> bool:
        """Whether the run takes no rows of this site any more."""
        return self.quarantined or self.state is SiteState.EVICTED

    @property
    def live(self) -> bool:
        """Whether the site holds its name now."""
        return self.state in (SiteState.CONNECTING, SiteState.ENROLLED)


class Task(_Record):
    """One open piece of work; it stays open until it is completed, failed or withdrawn."""

    id: str
    kind: TaskKind
    round: int
    site: str


class Update(_Record):
    """One site's accepted contribution to the open round."""

    artifact: Artifact
    samples: int
    loss: float


class ClosedRound(_Record):
    """What came of a round."""

    round: int
    cohort: list[str]
    contributions: dict[str, int]  # site -> rows trained on
    loss: float
    seconds: float

    @property
    def samples(self) -> int:
        """Rows trained on, over all contributors."""
        return sum(self.contributions.values())


class Evaluation(_Record):
    """One evaluator's sums over its held-out rows."""

    rows: int
    tokens: int
    loss_sum: float
    rouge_l_sum: float


class RunState(_Record):
    """All that survives a crash, as one row. Task ids, cohorts and first values follow from it and the seed."""

    run_id: str
    spec: RunSpec
    phase: Phase = Phase.ENROLLING
    message: str = ""
    round: int = 0
    started_at: float = 0.0
    round_opened_at: float = 0.0
    ended_at: float = 0.0
    fingerprint: dict[str, str] = Field(default_factory=dict)
    manifest: str = ""  # base64 of the wire message; empty until the first site attests
    sites: dict[str, Site] = Field(default_factory=dict)
    tasks: dict[str, Task] = Field(default_factory=dict)
    reports: dict[str, str] = Field(default_factory=dict)  # site -> base64 of its cluster report
    report_tasks: dict[str, str] = Field(default_factory=dict)  # site -> task in which it reported
    selection_pass: int = 0  # passes of the selection in progress that are done
    centres: str = ""  # base64 of the centres of the pass in progress; empty in the first one
    cells: str = ""  # base64 of the sums of all reports of the pass in progress
    coresets: dict[str, str] = Field(default_factory=dict)  # site -> base64 of its coreset, of the last selection
    cohort: list[str] = Field(default_factory=list)  # sites asked in the open selection or round; empty: none yet
    wanted: int = 0  # sites that the open round wants: its cohort before over-sampling
    target: int = 0  # answers that close it at once
    empty: list[str] = Field(default_factory=list)  # of the cohort, sites that have nothing to give
    failed: list[str] = Field(default_factory=list)  # of the cohort, sites whose task failed or was rejected
    deadline_reached: bool = False  # of the open selection or round
    paused: str | None = None  # the reason, while an operator's pause lasts
    updates: dict[str, Update] = Field(default_factory=dict)
    adapters: dict[int, Artifact] = Field(default_factory=dict)  # global adapters kept, by round
    closed_rounds: list[ClosedRound] = Field(default_factory=list)
    evaluations: dict[int, dict[str, Evaluation]] = Field(default_factory=dict)  # round -> evaluator -> sums

    @property
    def opening(self) -> str:
        """Names what is open now, so that an event about it cannot hit the next."""
        return f"{self.phase}/{self.round}.{self.selection_pass}"

    @property
    def pool_rows(self) -> int:
        """Training rows that all sites declared."""
        return sum(site.rows for site in self.sites.values())

    @property
    def trained_rows(self) -> int:
        """Distinct rows trained on: exact for one-shot selection, where a site's rows stay; else an upper bound."""
        per_site: dict[str, list[int]] = {}
        for closed in self.closed_rounds:
            for site, samples in closed.contributions.items():
                per_site.setdefault(site, []).append(samples)
        if self.spec.schedule == "one-shot":
            return sum(max(samples) for samples in per_site.values())
        return sum(min(self.sites[site].rows, sum(samples)) for site, samples in per_site.items())

    @property
    def adapter_manifest(self) -> AdapterManifest:
        """The manifest that the first site's adapter fixed; raises ValueError before that."""
        if not self.manifest:
            raise ValueError("no site has attested yet")
        return AdapterManifest.from_proto(pb.AdapterManifest.FromString(base64.b64decode(self.manifest)))

    def coreset_of(self, site: str) -> pb.Coreset:
        """The rows that `site` trains on by the last selection."""
        return pb.Coreset.FromString(base64.b64decode(self.coresets[site]))

    def most_samples(self, site: str) -> int:
        """Rows that `site` may train on at most by the last selection."""
        coreset, rows = self.coreset_of(site), self.sites[site].rows
        match coreset.WhichOneof("rows"):
            case "random":
                return min(rows, coreset.random.count)
            case "picks":
                return min(rows, sum(pick.count for pick in coreset.picks.clusters) + coreset.picks.unclustered)
        return rows

    def counted(self, task_id: str, site: str) -> bool:
        """Whether a result of `site` was taken for the task, which is closed; a site whose answer was lost asks."""
        kind, number, named, *_ = *task_id.split("/", 2), "", ""
        if named != site:
            return False
        match kind:
            case TaskKind.SELECT:
                return self.report_tasks.get(site) == task_id
            case TaskKind.TRAIN if number == str(self.round) and site in {*self.updates, *self.empty}:
                return True
            case TaskKind.TRAIN:
                return any(str(of.round) == number and site in of.contributions for of in self.closed_rounds)
            case TaskKind.EVALUATE:
                return any(str(of) == number and site in measured for of, measured in self.evaluations.items())
        return False

    def clusters_of(self, site: str) -> pb.ClusterReport:
        """The report of `site` for the selection in progress."""
        return pb.ClusterReport.FromString(base64.b64decode(self.reports[site]))

    def cells_of(self, site: str) -> pb.CellReport:
        """The counts that `site` reported in the pass in progress."""
        return pb.CellReport.FromString(base64.b64decode(self.reports[site]))

    @property
    def centres_now(self) -> pb.Centres | None:
        """The centres of the pass in progress; None in the first."""
        return pb.Centres.FromString(base64.b64decode(self.centres)) if self.centres else None

    @property
    def cells_now(self) -> pb.CellReport:
        """What the sites that answered in the pass in progress sum up to."""
        return pb.CellReport.FromString(base64.b64decode(self.cells))


def packed(message: pb.AdapterManifest | pb.Coreset | pb.ClusterReport | pb.CellReport | pb.Centres) -> str:
    """A wire message as text for the state's row; the same message gives the same text."""
    return base64.b64encode(message.SerializeToString(deterministic=True)).decode()
