"""Selection: sites report on their rows, step by step, until the strategy has a coreset for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message

from fedhds.errors import RequestError
from fedhds_server.counters import SELECTION_SECONDS
from fedhds_server.run.events import CoresetsSelected, Instruction, NextStep, Outcome, ResultReceived
from fedhds_server.run.state import Reply, RunState, Stage, Task, packed, unpacked, unpacked_any
from fedhds_server.selection import STRATEGIES, InterClientSelection, Report, SelectionContext
from fedhds_server.selection.base import Selection
from fedhds_server.workflows.base import Workflow, Workspace

if TYPE_CHECKING:
    from fedhds.spec import StrategySpec


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

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        spec, strategy, _ = _strategy(state)
        report = _read(spec, result)
        request = _request(spec, state.stage)
        fault = strategy.check(state.spec, request, report, rows=state.sites[task.site].rows)
        return ("report", f"the report is rejected: {fault}") if fault else None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        stage = state.stage
        if stage is None:
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
        decision = decide(state, stage)
        if isinstance(decision, Message):
            return NextStep(decision)
        workspace.record_selection(stage.round_number, decision)
        return CoresetsSelected(dict(decision.coresets), tuple(decision.notes))


@SELECTION_SECONDS.time()
def decide(state: RunState, stage: Stage) -> Selection | Message:
    """What the strategy makes of the replies of a stage: coresets, or the request of another step."""
    spec, strategy, report_type = _strategy(state)
    rows = {site: state.sites[site].rows for site in sorted(stage.replies)}
    context = SelectionContext(
        spec=state.spec,
        round_number=stage.round_number,
        rows=rows,
        budget=state.spec.selection.budget_of(sum(rows.values())),
        step=stage.step,
        request=_request(spec, stage),
        totals=unpacked(stage.totals, report_type) if stage.totals else None,
    )
    reports = {
        site: Report(reply.task_id, unpacked(reply.message, report_type))
        for site, reply in sorted(stage.replies.items())
        if reply.message
    }
    return strategy.select(context, reports)


def _strategy(state: RunState) -> tuple[StrategySpec, InterClientSelection, type[Message]]:
    spec = state.spec.selection.strategy
    return spec, STRATEGIES[spec.name], spec.report_type or Any


def _request(spec: StrategySpec, stage: Stage | None) -> Message | None:
    if stage is None or not stage.request or spec.request_type is None:
        return None
    return unpacked(stage.request, spec.request_type)


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
