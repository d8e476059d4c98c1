"""The plan of a run: when it starts, which stage follows which, and how it ends."""

from __future__ import annotations

from fedhds.tensors.artifact import Artifact
from fedhds_server.run import rollback, stages, validation
from fedhds_server.run.cohorts import drawn, eligible_sites, training_kind
from fedhds_server.run.events import (
    AdapterUpdated,
    CoresetsSelected,
    Discard,
    Instruction,
    NextStep,
    Outcome,
    Record,
    RoundAbandoned,
    RunRolledBack,
    Wake,
    WriteCheckpoint,
)
from fedhds_server.run.failures import last_failures
from fedhds_server.run.messages import VALIDATING, missing
from fedhds_server.run.parties import parties
from fedhds_server.run.quorum import CohortProgress, listed
from fedhds_server.run.state import ClosedRound, Phase, Reply, RunState, Stage, packed
from fedhds_server.workflows.evaluation import EvaluationTasks, evaluated_rounds, missing_evaluations
from fedhds_server.workflows.selection import SelectionWorkflow
from fedhds_server.workflows.training import contributions

# A round whose every task failed leaves the adapter as it is. One may be bad luck (a full disk, a GPU that another
# job uses); three in a row mean that the run cannot make progress and that somebody should look.
_MAX_FAILED_ROUNDS = 3
_SELECT, _EVALUATE = SelectionWorkflow.kind, EvaluationTasks.kind


def advance(state: RunState, at: float) -> list[Instruction]:
    """Moves on when enough has come."""
    if state.phase is Phase.ENROLLING:
        return _start_if_ready(state, at)
    if state.phase.over:
        return []
    notes: list[Instruction] = []
    if max(state.adapters) > state.validated_round:
        before = state.artifacts
        notes = _validated(state)
        notes += _discards(before - state.artifacts)
    if state.stage is not None or state.phase is Phase.FINISHING:
        return [*notes, *_moved_on(state, at)]
    waits = validation.is_validating(state)
    return [*notes, *([] if waits else [*_go_on(state, at), Wake()])]


def _moved_on(state: RunState, at: float) -> list[Instruction]:
    if state.phase is Phase.FINISHING and not _evaluating(state):
        stages.withdraw(state, kind=_EVALUATE)
        return end(state, Phase.COMPLETED, validation.completed(state), at)
    progress = CohortProgress.of(state)
    if progress is None:
        return []
    if progress.complete:
        return stages.close(state)
    if progress.short:
        return _fill_up(state, progress, at)
    stages.describe(state)
    return []


def resolved(state: RunState, outcome: Outcome, at: float) -> list[Instruction]:
    """What follows the closed stage."""
    stage = state.stage
    if stage is None:
        return []
    before = state.artifacts
    match outcome:
        case NextStep(request, artifact, secure, only):
            # Sites that were excluded while the strategy was at work get no further step.
            asked = stage.replies if only is None else only
            sites = sorted(site for site in asked if not state.sites[site].excluded)
            target, step = len(sites if secure else parties(sites)), stage.step + 1
            stages.open_stage(
                state, stage.kind, sites, target, request=request, artifact=artifact, step=step, secure=secure
            )
            if state.stage is not None:
                state.stage.rows = dict(outcome.rows)
            return [*_discards(before - state.artifacts), Wake()]
        case CoresetsSelected():
            return [*_selected(state, stage, outcome, at), *_discards(before - state.artifacts), Wake()]
        case RoundAbandoned(reason):
            note = Record(f"round {state.round_number} has no result: {reason}", trouble=True)
            kept = AdapterUpdated(state.adapter, state.slots, results={})
            return [note, *_round_closed(state, stage, kept, at), Wake()]
        case AdapterUpdated():
            return [*_round_closed(state, stage, outcome, at), Wake()]


def rolled_back(state: RunState, event: RunRolledBack) -> list[Instruction]:
    """Goes on from the adapter of an earlier round; the open round ends without a result."""
    if state.phase.over or event.round_number not in state.adapters:
        return []
    before = state.artifacts
    reason = f"taken back to round {event.round_number}: {event.reason}"
    notes: list[Instruction] = [Record(f"the run is {reason}", trouble=True)]
    number, stage = rollback.open_round(state), state.stage
    if stage is not None:
        stages.withdraw(state, kind=stage.kind)
        state.stage = None
    rollback.go_back(state, event.round_number)
    if number is not None:
        seconds = event.at - state.round_opened_at
        state.closed_rounds.append(
            ClosedRound(round_number=number, cohort=[], contributions={}, loss=None, seconds=seconds, unchanged=reason)
        )
    add_evaluations(state)
    notes.append(WriteCheckpoint())
    if state.phase is Phase.RUNNING:
        notes += _go_on(state, event.at)
    return [*notes, *_discards(before - state.artifacts), Wake()]


def add_evaluations(state: RunState) -> None:
    """Opens the tasks of evaluations and validations that are due."""
    for task_id, number, site in missing_evaluations(state):
        stages.add_task(state, task_id, _EVALUATE, number, site)
    for task_id, number, site in validation.missing_validations(state):
        stages.add_task(state, task_id, validation.KIND, number, site)


def end(state: RunState, phase: Phase, reason: str, at: float, *, failures: str = "") -> list[Instruction]:
    """Ends the run; its last global adapter stays. `failures` names sites: it is for operators."""
    message, before = reason + failures, state.artifacts
    if state.adapters:
        # Nothing leads back any more.
        _keep_adapters(state, set())
        state.slots_at = {}
    state.phase, state.message, state.end_message, state.ended_at = phase, message, reason, at
    state.tasks, state.stage, state.paused = {}, None, None
    verb = {Phase.COMPLETED: "is complete", Phase.STOPPED: "is stopped"}.get(phase, "failed")
    note = Record(f"the run {verb}: {message}", trouble=phase is not Phase.COMPLETED)
    return [note, *_discards(before - state.artifacts), WriteCheckpoint(), Wake()]


def _start_if_ready(state: RunState, at: float) -> list[Instruction]:
    awaited = missing(state)
    if awaited or 0 not in state.adapters:
        state.message = f"waiting for {awaited or 'the initial adapter'}{last_failures(state)}"
        return []
    state.started_at, state.phase = at, Phase.RUNNING
    pool = sum(state.sites[name].rows for name in state.trainers)
    note = Record(f"the run starts with {len(state.trainers)} sites that have {pool} rows")
    add_evaluations(state)
    first = _open_selection(state) if state.spec.selection.one_shot else _open_round(state, at)
    return [note, WriteCheckpoint(), *first, Wake()]


def _open_selection(state: RunState) -> list[Instruction]:
    """Asks the trainers (one-shot) or the round's cohort (per round) for reports, if the strategy needs any."""
    state.coresets = {}
    sites = state.trainers if state.spec.selection.one_shot else drawn(state, state.trainers)
    if state.spec.selection.asks_sites:
        stages.open_stage(state, _SELECT, sites, len(parties(sites)))
        return []
    replies = {site: Reply(task_id="") for site in sites}
    target = len(parties(sites))
    state.stage = Stage(kind=_SELECT, round_number=state.round_number, cohort=sites, target=target, replies=replies)
    return stages.close(state)


def _open_round(state: RunState, at: float) -> list[Instruction]:
    state.round_number += 1
    return _fill_round(state, at)


def _fill_round(state: RunState, at: float) -> list[Instruction]:
    """Draws the cohort of the open round; waits, with a message, while no live site could be in it."""
    state.round_opened_at = at
    stages.open_stage(state, training_kind(state), [], 0)
    eligible = eligible_sites(state)
    state.round_size = state.spec.rounds.cohort_of(len(parties(eligible)))
    if not eligible:
        return stages.waits(state)
    if not state.spec.selection.one_shot:
        return _open_selection(state)
    return _open_training(state, drawn(state, eligible), at)


def _open_training(state: RunState, cohort: list[str], at: float) -> list[Instruction]:
    secure = state.spec.secure
    stages.open_stage(state, training_kind(state), cohort, min(len(parties(cohort)), state.round_size))
    if not cohort:
        note = Record(f"round {state.round_number}: no row was selected, the adapter stays as it is")
        return [note, *stages.close(state)]
    if secure.enabled and len(parties(cohort)) < secure.min_sites:
        reason = f"sites of {len(parties(cohort))} certificates have rows, --min-secure-sites is {secure.min_sites}"
        note = Record(f"round {state.round_number} is not run: {reason}", trouble=True)
        return [note, *stages.close(state)]
    return [Record(f"round {state.round_number} of {state.spec.rounds.count} opens with {listed(cohort)}")]


def _fill_up(state: RunState, progress: CohortProgress, at: float) -> list[Instruction]:
    """Asks others in place of disconnected sites, or starts again where others cannot replace them."""
    stage = state.stage
    if stage is None:
        return []
    able = state.trainers if stage.kind == _SELECT else eligible_sites(state)
    if not progress.workflow.replaceable(state, stage):
        if not progress.answered and not progress.failed and able and not progress.by_site:
            # Nothing has come that a new start would throw away.
            stages.withdraw(state, kind=stage.kind)
            again = _open_selection(state) if stage.kind == _SELECT else _fill_round(state, at)
            return [*again, Wake()]
        # Of the cohort, those that left and came back.
        able = [site for site in able if site in stage.cohort]
    spare = [site for site in able if site not in progress.answered | progress.failed]
    if not stage.cohort and spare:
        # A selection for all rounds comes before the first of them.
        before = stage.kind == _SELECT and state.spec.selection.one_shot
        return [*(_open_selection(state) if before else _fill_round(state, at)), Wake()]
    if not stage.cohort:
        return stages.waits(state)
    return stages.ask_others(state, progress, spare)


def _selected(state: RunState, stage: Stage, outcome: CoresetsSelected, at: float) -> list[Instruction]:
    # Sites that were excluded while the strategy was at work get no coreset.
    coresets = {site: rows for site, rows in sorted(outcome.coresets.items()) if not state.sites[site].excluded}
    state.coresets = {site: packed(rows) for site, rows in coresets.items()}
    notes: list[Instruction] = [Record(note) for note in outcome.notes]
    notes.append(Record(f"selection: {len(coresets)} of {len(stage.replies)} sites have rows to train on"))
    failures = last_failures(state, stage)
    if not state.spec.selection.one_shot:
        if stage.replies:
            return [*notes, *_open_training(state, sorted(coresets), at)]
        # Its tasks were given, and all failed: a failed round.
        number, kind = state.round_number, training_kind(state)
        state.stage = Stage(kind=kind, round_number=number, cohort=stage.cohort, failed=stage.failed)
        note = Record(f"round {state.round_number}: no site could select; the adapter stays as it is{failures}", True)
        return [*notes, note, *stages.close(state)]
    if not coresets:
        message = "the selection chose no row of any site; give it a --selection-budget"
        message = message if stage.replies else "no site could select"
        return [*notes, *end(state, Phase.FAILED, message, at, failures=failures)]
    return [*notes, *_open_round(state, at)]


def _round_closed(state: RunState, stage: Stage, outcome: AdapterUpdated, at: float) -> list[Instruction]:
    before = state.artifacts
    notes: list[Instruction] = []
    for site, reason in sorted(outcome.damaged.items()):
        stage.replies.pop(site, None)
        stage.failed.append(site)
        state.sites[site].last_error = reason
        message = f"round {state.round_number} goes on without the update of site {site}: {reason}"
        notes.append(Record(message, trouble=True))
    notes += [Record(f"round {state.round_number}: {note}") for note in outcome.report.notes]
    if outcome.report.unchanged:
        message = f"round {state.round_number} is not combined, the adapter stays as it is: {outcome.report.unchanged}"
        notes.append(Record(message, trouble=True))
    # Of a round that is not combined, no update counts.
    updates = {} if outcome.report.unchanged else outcome.results
    updates = contributions(stage) if updates is None else updates
    samples = sum(update.samples for update in updates.values())
    # Sites keep the loss of a few rows to themselves.
    said = [update for update in updates.values() if update.HasField("loss")]
    weight = sum(update.samples for update in said)
    loss = sum(update.samples * update.loss for update in said) / weight if weight else None
    closed = ClosedRound(
        round_number=state.round_number,
        cohort=stage.cohort,
        contributions={site: update.samples for site, update in updates.items()},
        loss=loss,
        seconds=at - state.round_opened_at,
        bytes_received=sum(upload.size for upload in stage.uploads),
        tokens_per_s=sum(update.tokens_per_s for update in updates.values()),
        product_gap=outcome.report.product_gap,
        updates=dict(outcome.report.updates),
        unchanged=outcome.report.unchanged,
    )
    state.closed_rounds.append(closed)
    rollback.keep_slots(state)
    state.adapters[state.round_number] = outcome.adapter
    state.slots = dict(outcome.slots)
    state.stage = None
    add_evaluations(state)
    notes.append(
        Record(
            f"round {state.round_number} closed with {len(updates)} updates over {samples} samples"
            + (f", training loss {loss:.4f}" if loss is not None else "")
        )
    )
    notes += [WriteCheckpoint(), *_validated(state), *_after_round(state, stage, at)]
    # The run's end has its own.
    ended = {note.artifact for note in notes if isinstance(note, Discard)}
    return [*notes, *_discards(before - state.artifacts - ended)]


def _validated(state: RunState) -> list[Instruction]:
    """Takes what validation says so far; adapters that are not needed any more are named no more."""
    best = state.best_round
    notes: list[Instruction] = [Record(note) for note in validation.settle(state)]
    to = rollback.previous_round(state)
    if to is not None and (reason := rollback.jump(state)):
        given_up = f"given up for the adapter of round {to}: {reason}"
        notes.append(Record(f"round {max(state.adapters)} is {given_up}", trouble=True))
        state.closed_rounds[-1].unchanged = given_up
        rollback.go_back(state, to)
        notes.append(WriteCheckpoint())
    _keep_adapters(state, {rollback.previous_round(state)})
    rollback.drop_slots(state)
    return [*notes, *[WriteCheckpoint()] * (state.best_round != best)]


def _keep_adapters(state: RunState, wanted: set[int | None]) -> None:
    """Names no adapters but `wanted` ones, those that are measured, the newest and the best."""
    needed = {*evaluated_rounds(state), max(state.adapters), state.best_round, *wanted}
    state.adapters = {
        number: adapter
        for number, adapter in state.adapters.items()
        if number in needed or number > state.validated_round
    }


def _after_round(state: RunState, stage: Stage, at: float) -> list[Instruction]:
    recent = state.closed_rounds[-_MAX_FAILED_ROUNDS:]
    # Per-round selection may rightly choose no site; a round failed only when tasks were given and all failed.
    if len(recent) == _MAX_FAILED_ROUNDS and all(closed.cohort and not closed.contributions for closed in recent):
        message = f"no site delivered an update in {_MAX_FAILED_ROUNDS} rounds in a row"
        if reason := recent[-1].unchanged:
            message = f"no update was combined in {_MAX_FAILED_ROUNDS} rounds in a row: {reason}"
        return end(state, Phase.FAILED, message, at, failures=last_failures(state, stage))
    last = state.round_number == state.spec.rounds.count
    if last and not any(closed.contributions for closed in state.closed_rounds):
        message = "no site delivered an update in any round, the adapter is untrained"
        return end(state, Phase.FAILED, message, at, failures=last_failures(state, stage))
    return _go_on(state, at)


def _go_on(state: RunState, at: float) -> list[Instruction]:
    """Opens the next round, or ends the run, once the last round is validated."""
    if validation.is_validating(state):
        state.message = VALIDATING
        return []
    reason = validation.early_stop(state) if state.round_number < state.spec.rounds.count else ""
    if state.round_number < state.spec.rounds.count and not reason:
        return _open_round(state, at)
    state.phase = Phase.FINISHING
    state.message = "waiting for the last evaluations"
    add_evaluations(state)
    note = [Record(f"the run stops early: {reason}")] if reason else []
    return [*note, *advance(state, at)]


def _evaluating(state: RunState) -> bool:
    """Whether a live site still has an evaluation to make."""
    return any(task.kind == _EVALUATE and state.sites[task.site].live for task in state.tasks.values())


def _discards(artifacts: set[Artifact]) -> list[Instruction]:
    return [Discard(artifact) for artifact in sorted(artifacts, key=lambda artifact: artifact.digest)]
