"""Selection: sites report on their rows, step by step, until the strategy has a coreset for each."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from fedhds.errors import DamagedArtifact, RequestError
from fedhds.kmeans import OVERSPLIT
from fedhds.long_messages import MAX_INLINE, artifact_of, long_message, standing_for
from fedhds.tensors.artifact import Artifact
from fedhds.v2.selection_pb2 import FilteredRequest, ScoreHistogram
from fedhds_server.counters import SELECTION_SECONDS
from fedhds_server.run.events import CoresetsSelected, Instruction, NextStep, Outcome, ResultReceived
from fedhds_server.run.state import Reply, RunState, Stage, Task, packed, unpacked, unpacked_any
from fedhds_server.selection import STRATEGIES, InterClientSelection, Report, SelectionContext
from fedhds_server.selection.base import Selection
from fedhds_server.selection.filters import fault_of, filtered, with_ranges
from fedhds_server.workflows.base import MAX_SMALL_RESULT, Load, Workflow, Workspace

if TYPE_CHECKING:
    from fedhds.spec import StrategySpec


logger = logging.getLogger(__name__)

MessageType = TypeVar("MessageType", bound=Message)

# For reports of strategies whose size follows from something else.
_MIN_UPLOAD_LIMIT = 1 << 20


class SelectionWorkflow(Workflow):
    """Reports in, coresets out; what they say is the strategy's own."""

    kind = "select"
    collecting = "selecting"
    resolving = "grouping"
    answers = "reports"

    def title(self, state: RunState, stage: Stage) -> str:
        return "selecting" + (f", step {stage.step + 1}" if stage.step else "")

    def closing(self, state: RunState, stage: Stage) -> str:
        return f"selecting: deciding on the reports of {len(stage.replies)} sites"

    def resolver(self, state: RunState) -> str:
        return f"the selection strategy {state.spec.selection.strategy.name}"

    def request(self, state: RunState, task: Task) -> Any | None:
        return unpacked_any(state.stage.request) if state.stage and state.stage.request else None

    def result_limit(self, state: RunState, site: str) -> int:
        return MAX_INLINE + MAX_SMALL_RESULT

    def upload_sizes(self, state: RunState, task: Task) -> range:
        # A vector of doubles for each cluster: no more than rows or, under noise, centers.
        clusters = state.sites[task.site].rows + OVERSPLIT * state.spec.privacy.selection.released_centroids
        values = state.spec.selection.features.dimension + 8
        return range(1, max(_MIN_UPLOAD_LIMIT, 8 * values * clusters) + 1)

    def upload_of(self, result: Any) -> Artifact | None:
        return artifact_of(result)

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        if state.stage and state.stage.request_artifact:
            return "report", "the report is rejected: it answers a long request, and did not come as an upload"
        return self._check(state, task, result, _no_artifact)

    def check_long(self, state: RunState, task: Task, result: Any, load: Load) -> tuple[str, str] | None:
        return self._check(state, task, result, load)

    def _check(self, state: RunState, task: Task, result: Any, load: Load) -> tuple[str, str] | None:
        step = _Step.of(state, state.stage, load)
        report = step.read(result)
        # Under noise what filters have left is known up to their noise only.
        declared = state.sites[task.site].rows
        noised = state.spec.privacy.selection.noised
        rows = declared if noised or state.stage is None else state.stage.rows.get(task.site, declared)
        if isinstance(report, ScoreHistogram):
            fault = fault_of(report, state.spec, request=step.filtered, rows=rows)
        else:
            fault = step.strategy.check(state.spec, step.request, report, rows=rows)
        return ("report", f"the report is rejected: {fault}") if fault else None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        stage = state.stage
        if stage is None:
            return []
        if event.artifact is not None:
            # It is added up when the stage is resolved: the state would grow with it.
            stage.replies[task.site] = Reply(task_id=task.id, artifact=event.artifact, long=True)
            return []
        step = _Step.of(state, stage)
        report = step.read(event.result)
        before = unpacked(stage.totals, step.report_type) if stage.totals else None
        totals, remainder = step.add(before, report)
        if totals is not None:
            stage.totals = packed(totals)
        stage.replies[task.site] = Reply(task_id=task.id, message=packed(remainder))
        return []

    def replaceable(self, state: RunState, stage: Stage) -> bool:
        # Other sites have no part in the steps before.
        return not stage.step

    def resolve(self, state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
        decision = decide(state, stage, lambda artifact: workspace.verified(artifact).read_bytes())
        if isinstance(decision, NextStep):
            request = Any()
            request.Pack(decision.request, deterministic=True)
            if request.ByteSize() <= MAX_INLINE:
                return decision
            artifact = workspace.keep(request.SerializeToString(deterministic=True))
            return replace(decision, request=standing_for(artifact), artifact=artifact)
        workspace.record_selection(stage.round_number, decision)
        return CoresetsSelected(dict(decision.coresets), tuple(decision.notes))


def _no_artifact(artifact: Artifact) -> bytes:
    raise DamagedArtifact(f"the message {artifact.digest[:12]} is kept as an artifact, and none was looked up")


@SELECTION_SECONDS.time()
def decide(state: RunState, stage: Stage, load: Load = _no_artifact) -> Selection | NextStep:
    """What follows from the replies of a stage: coresets, or another step.

    A report whose bytes are no longer those that were accepted is left out.
    """
    step = _Step.of(state, stage, load)
    totals = unpacked(stage.totals, step.report_type) if stage.totals else None
    reports: dict[str, Report] = {}
    damaged: set[str] = set()
    for site, reply in sorted(stage.replies.items()):
        try:
            if reply.artifact:
                totals, remainder = step.add(totals, step.read(long_message(load(reply.artifact))))
                reports[site] = Report(reply.task_id, remainder)
            elif reply.message:
                reports[site] = Report(reply.task_id, unpacked(reply.message, step.report_type))
        except DamagedArtifact as error:
            logger.error("the selection goes on without the report of site %s: %s", site, error)
            damaged.add(site)
    pool = {site: state.sites[site].rows for site in sorted(stage.replies.keys() - damaged)}
    rows = {site: stage.rows.get(site, count) for site, count in pool.items()}
    request, notes = step.filtered, tuple[str, ...]()
    if step.filter:
        outcome = filtered(step.filtered, state.spec, reports, rows)
        logger.info("%s", outcome.note)
        if outcome.request.filter or state.spec.selection.strategy.report_type is not None:
            return NextStep(outcome.request, rows=outcome.rows)
        # The strategy asks nothing of sites.
        request, rows, reports, notes = outcome.request, dict(outcome.rows), {}, (outcome.note,)
    if request.ranges and not any(rows.values()):
        return Selection({}, notes=(*notes, "the filters keep no row of any site"))
    budget = state.spec.selection.budget_of(sum(pool.values()))
    context = SelectionContext(
        spec=state.spec,
        round_number=stage.round_number,
        rows=rows,
        budget=budget if budget is None else min(budget, sum(rows.values())),
        step=stage.step - len(state.spec.selection.filter_names),
        request=step.request,
        totals=totals,
    )
    decision = step.strategy.select(context, reports)
    if isinstance(decision, Selection):
        coresets = with_ranges(decision.coresets, request) if request.ranges else decision.coresets
        return replace(decision, coresets=coresets, notes=(*notes, *decision.notes))
    if not request.ranges:
        return NextStep(decision)
    own = Any()
    own.Pack(decision, deterministic=True)
    return NextStep(FilteredRequest(ranges=request.ranges, request=own), rows=rows)


@dataclass(frozen=True)
class _Step:
    """What a stage of a selection asks: the scores of a filter, or what the run's strategy wants to know."""

    strategy: InterClientSelection
    spec: StrategySpec
    filtered: FilteredRequest
    """Of a run without filters an empty one."""
    request: Message | None
    """The strategy's own."""

    @classmethod
    def of(cls, state: RunState, stage: Stage | None, load: Load = _no_artifact) -> Self:
        selection = state.spec.selection
        strategy = STRATEGIES[selection.strategy.name]
        own, names = selection.strategy.request_type, selection.filter_names
        packed_request = _packed_request(stage, load)
        if not names:
            request = None if packed_request is None or own is None else _unpacked(packed_request, own)
            return cls(strategy, selection.strategy, FilteredRequest(), request)
        if packed_request is None:
            return cls(strategy, selection.strategy, FilteredRequest(filter=names[0]), None)
        filtered_request = _unpacked(packed_request, FilteredRequest)
        given = filtered_request.HasField("request") and own is not None
        request = _unpacked(filtered_request.request, own) if given and own else None
        return cls(strategy, selection.strategy, filtered_request, request)

    @property
    def filter(self) -> str:
        """The filter whose scores are asked for; empty where it is the strategy's turn."""
        return self.filtered.filter

    @property
    def report_type(self) -> type[Message]:
        """Of what sites answer."""
        return ScoreHistogram if self.filter else self.spec.report_type or Any

    def add(self, totals: Message | None, report: Message) -> tuple[Message | None, Message]:
        """Adds a report up, where the strategy does; histograms are kept one by one."""
        return (None, report) if self.filter else self.strategy.add(totals, report)

    def read(self, result: Any) -> Message:
        """The report in a result; raises RequestError when it is none of this step's."""
        kind = self.report_type
        if kind is Any:
            raise RequestError(f"the selection strategy {self.spec.name} takes no reports")
        report = kind()
        try:
            if result.Unpack(report):
                # They would be kept with the state, whatever their size.
                report.DiscardUnknownFields()
                return report
        except DecodeError as error:
            raise RequestError("the report's bytes are no message of its type") from error
        who = f"filter {self.filter}" if self.filter else f"selection strategy {self.spec.name}"
        raise RequestError(f"the {who} takes a {kind.DESCRIPTOR.full_name}, not a {result.TypeName()[:100]!r}")


def _packed_request(stage: Stage | None, load: Load) -> Any | None:
    if stage is None or not stage.request:
        return None
    if stage.request_artifact is not None:
        return long_message(load(stage.request_artifact))
    return unpacked_any(stage.request)


def _unpacked(request: Any, kind: type[MessageType]) -> MessageType:
    message = kind()
    if not request.Unpack(message):
        raise ValueError(f"the request of a stage is no {kind.DESCRIPTOR.full_name}")
    return message
