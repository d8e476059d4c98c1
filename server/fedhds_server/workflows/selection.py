"""Selection: sites report on their rows, step by step, until the strategy has a coreset for each."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from fedhds.errors import DamagedArtifact, RequestError
from fedhds.kmeans import OVERSPLIT
from fedhds.long_messages import MAX_INLINE, artifact_of, long_message, standing_for
from fedhds.tensors.artifact import Artifact
from fedhds_server.counters import SELECTION_SECONDS
from fedhds_server.run.events import CoresetsSelected, Instruction, NextStep, Outcome, ResultReceived
from fedhds_server.run.state import Reply, RunState, Stage, Task, packed, unpacked, unpacked_any
from fedhds_server.selection import STRATEGIES, InterClientSelection, Report, SelectionContext
from fedhds_server.selection.base import Selection
from fedhds_server.workflows.base import MAX_SMALL_RESULT, Load, Workflow, Workspace

if TYPE_CHECKING:
    from fedhds.spec import StrategySpec


logger = logging.getLogger(__name__)

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
        spec, strategy, _ = _strategy(state)
        report = _read(spec, result)
        request = _request(spec, state.stage, load)
        fault = strategy.check(state.spec, request, report, rows=state.sites[task.site].rows)
        return ("report", f"the report is rejected: {fault}") if fault else None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        stage = state.stage
        if stage is None:
            return []
        if event.artifact is not None:
            # It is added up when the stage is resolved: the state would grow with it.
            stage.replies[task.site] = Reply(task_id=task.id, artifact=event.artifact, long=True)
            return []
        spec, strategy, report_type = _strategy(state)
        report = _read(spec, event.result)
        before = unpacked(stage.totals, report_type) if stage.totals else None
        totals, remainder = strategy.add(before, report)
        if totals is not None:
            stage.totals = packed(totals)
        stage.replies[task.site] = Reply(task_id=task.id, message=packed(remainder))
        return []

    def replaceable(self, state: RunState, stage: Stage) -> bool:
        # Other sites have no part in the steps before.
        return not stage.step

    def resolve(self, state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
        decision = decide(state, stage, lambda artifact: workspace.verified(artifact).read_bytes())
        if isinstance(decision, Message):
            request = Any()
            request.Pack(decision, deterministic=True)
            if request.ByteSize() <= MAX_INLINE:
                return NextStep(decision)
            artifact = workspace.keep(request.SerializeToString(deterministic=True))
            return NextStep(standing_for(artifact), artifact)
        workspace.record_selection(stage.round_number, decision)
        return CoresetsSelected(dict(decision.coresets), tuple(decision.notes))


def _no_artifact(artifact: Artifact) -> bytes:
    raise DamagedArtifact(f"the message {artifact.digest[:12]} is kept as an artifact, and none was looked up")


@SELECTION_SECONDS.time()
def decide(state: RunState, stage: Stage, load: Load = _no_artifact) -> Selection | Message:
    """What the strategy makes of the replies of a stage: coresets, or the request of another step.

    A report whose bytes are no longer those that were accepted is left out.
    """
    spec, strategy, report_type = _strategy(state)
    totals = unpacked(stage.totals, report_type) if stage.totals else None
    reports: dict[str, Report] = {}
    damaged: set[str] = set()
    for site, reply in sorted(stage.replies.items()):
        try:
            if reply.artifact:
                totals, remainder = strategy.add(totals, _read(spec, long_message(load(reply.artifact))))
                reports[site] = Report(reply.task_id, remainder)
            elif reply.message:
                reports[site] = Report(reply.task_id, unpacked(reply.message, report_type))
        except DamagedArtifact as error:
            logger.error("the selection goes on without the report of site %s: %s", site, error)
            damaged.add(site)
    rows = {site: state.sites[site].rows for site in sorted(stage.replies.keys() - damaged)}
    context = SelectionContext(
        spec=state.spec,
        round_number=stage.round_number,
        rows=rows,
        budget=state.spec.selection.budget_of(sum(rows.values())),
        step=stage.step,
        request=_request(spec, stage, load),
        totals=totals,
    )
    return strategy.select(context, reports)


def _strategy(state: RunState) -> tuple[StrategySpec, InterClientSelection, type[Message]]:
    spec = state.spec.selection.strategy
    return spec, STRATEGIES[spec.name], spec.report_type or Any


def _request(spec: StrategySpec, stage: Stage | None, load: Load) -> Message | None:
    if stage is None or not stage.request or spec.request_type is None:
        return None
    if stage.request_artifact is None:
        return unpacked(stage.request, spec.request_type)
    request = spec.request_type()
    if not long_message(load(stage.request_artifact)).Unpack(request):
        raise ValueError(f"the request of the stage {stage.name} is no {spec.request_type.DESCRIPTOR.full_name}")
    return request


def _read(spec: StrategySpec, result: Any) -> Message:
    """The report in a result; raises RequestError when it is none of the run's strategy."""
    if spec.report_type is None:
        raise RequestError(f"the selection strategy {spec.name} takes no reports")
    report = spec.report_type()
    try:
        if result.Unpack(report):
            # They would be kept with the state, whatever their size.
            report.DiscardUnknownFields()
            return report
    except DecodeError as error:
        raise RequestError("the report's bytes are no message of its type") from error
    raise RequestError(
        f"the selection strategy {spec.name} takes a {spec.report_type.DESCRIPTOR.full_name}, not a "
        f"{result.TypeName()[:100]!r}"
    )
