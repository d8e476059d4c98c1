"""The run as a pure state machine: events in, instructions out; no I/O and no clock of its own."""

from __future__ import annotations

import hashlib
import math

from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb
from fedhds_server.collection import Collection, cohort_size, draw, listed
from fedhds_server.events import (
    AdapterDrawn,
    Aggregate,
    DeadlineReached,
    Discard,
    DrawAdapter,
    EvaluationReceived,
    Event,
    FinalDelivered,
    Instruction,
    NothingToGive,
    PassOpened,
    Record,
    ReportReceived,
    ResultRejected,
    RetryDue,
    RoundAggregated,
    RunPaused,
    RunResumed,
    RunStopped,
    Select,
    SelectionMade,
    SiteAttested,
    SiteConnected,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteSilent,
    TaskFailed,
    UpdateDamaged,
    UpdateReceived,
    Wake,
    WriteCheckpoint,
)
from fedhds_server.selection.cells import added, without_sums
from fedhds_server.state import ClosedRound, Phase, RunState, Site, SiteState, Task, TaskKind, Update, packed

# A round whose every task failed leaves the adapter as it is. One may be bad luck (a full disk, a GPU that another
# job holds); three in a row mean that the run cannot make progress and that somebody should look.
_FUTILE_ROUNDS = 3
# Results of one site that did not pass validation: one may be a fault that passes, three are a broken or hostile site.
_QUARANTINE_AFTER = 3


class RunMachine:
    """Drives one `RunState`. `handle` changes the state and says what is to be done about it.

    A result that comes too late, twice, or from a site that the round no longer counts changes nothing.
    """

    def __init__(self, state: RunState, *, needs_reports: bool) -> None:
        self.state = state
        self._needs_reports = needs_reports
        # When something came in from which more may follow.
        self._moved_at: float | None = None

    @property
    def spec(self) -> RunSpec:
        """The run's specification."""
        return self.state.spec

    def next_task(self, site: str) -> Task | None:
        """The open task that `site` should do now."""
        order = list(TaskKind)
        mine = [task for task in self.state.tasks.values() if task.site == site]
        return min(mine, key=lambda task: (order.index(task.kind), task.round), default=None)

    def evaluation_rounds(self) -> list[int]:
        """Rounds whose adapters are evaluated, of those that have one now."""
        every = self.spec.evaluate_every
        return sorted(
            number
            for number in self.state.adapters
            if number in (0, self.spec.rounds) or (every and number % every == 0) or self._is_last(number)
        )

    def pending(self) -> list[Instruction]:
        """Instructions whose answers the state still waits for, after a restart."""
        state = self.state
        if state.manifest and 0 not in state.adapters and not state.phase.over:
            return [DrawAdapter()]
        if state.phase is Phase.GROUPING:
            return [self._selection()]
        if state.phase is Phase.AGGREGATING:
            return [Aggregate(state.round)]
        if state.adapters:
            return [WriteCheckpoint()]
        return []

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event and moves on."""
        return [*self.apply(event), *self.advance()]

    def apply(self, event: Event) -> list[Instruction]:
        """Applies one event; `advance` is to follow, after this one or the last of several that came together."""
        match event:
            case SiteConnected():
                return self._connected(event)
            case SiteAttested():
                return self._attested(event)
            case SiteSilent() | SiteLeft():
                return self._gone(event)
            case SiteHeard():
                return self._heard(event)
            case SiteEvicted():
                return self._evicted(event)
            case AdapterDrawn():
                self.state.adapters[0] = event.adapter
                self._moved_at = event.at
                return []
            case ReportReceived():
                return self._reported(event)
            case PassOpened():
                return self._pass_opened(event)
            case SelectionMade():
                return self._selected(event)
            case UpdateReceived():
                return self._updated(event)
            case UpdateDamaged():
                return self._dropped(event)
            case EvaluationReceived():
                return self._evaluated(event)
            case TaskFailed():
                return self._failed(event)
            case ResultRejected():
                return self._rejected(event)
            case NothingToGive():
                return self._nothing_to_give(event)
            case DeadlineReached():
                return self._deadline_reached(event)
            case RetryDue():
                return self._retried(event)
            case RoundAggregated():
                return self._aggregated(event)
            case RunPaused():
                return self._paused(event)
            case RunResumed():
                return self._resumed(event)
            case RunStopped():
                return self._stopped(event)
            case FinalDelivered():
                self.state.sites[event.site].delivered = True
                return [Wake()]

    # Who takes part.

    def _connected(self, event: SiteConnected) -> list[Instruction]:
        site = self.state.sites.setdefault(event.site, Site(name=event.site))
        site.key = site.key or event.key
        site.session = event.session
        site.state = SiteState.CONNECTING
        return [Wake()]

    def _attested(self, event: SiteAttested) -> list[Instruction]:
        state = self.state
        site = state.sites[event.site]
        known = site.state is SiteState.ENROLLED
        site.rows, site.evaluates = event.rows, event.evaluates
        site.state, site.last_error = SiteState.ENROLLED, ""
        instructions: list[Instruction] = []
        if not known:
            brings = [f"{event.rows} rows"] * bool(event.rows) + ["held-out rows"] * event.evaluates
            instructions.append(Record(f"site {event.site} enrolled with {' and '.join(brings)}"))
            if event.rows and self.spec.schedule == "one-shot" and state.round and event.site not in state.coresets:
                instructions.append(
                    Record(f"site {event.site} came after the selection: it gets the final adapter but trains no round")
                )
        if not state.manifest:
            state.fingerprint = event.fingerprint
            state.manifest = packed(event.manifest.to_proto())
            instructions.append(DrawAdapter())
        self._add_evaluations()
        self._moved_at = event.at
        return [*instructions, Wake()]

    def _gone(self, event: SiteSilent | SiteLeft) -> list[Instruction]:
        site = self.state.sites[event.site]
        if not site.live:
            return []
        silent = isinstance(event, SiteSilent)
        site.state = SiteState.LOST if silent else SiteState.LEFT
        if isinstance(event, SiteLeft):
            site.last_error = event.reason or site.last_error
            # Nothing more can come from a site that said goodbye; a lost one may yet return to its task.
            self.state.tasks = {key: task for key, task in self.state.tasks.items() if task.site != event.site}
        because = f": {event.reason}" if isinstance(event, SiteLeft) and event.reason else ""
        message = f"site {event.site} {'is lost (no sign of life)' if silent else 'left'}{because}"
        over = self.state.phase.over
        self._moved_at = event.at
        return [Record(message, trouble=not over), Wake()]

    def _heard(self, event: SiteHeard) -> list[Instruction]:
        site = self.state.sites[event.site]
        if site.state is not SiteState.LOST:
            return []
        site.state = SiteState.ENROLLED if site.rows or site.evaluates else SiteState.CONNECTING
        self._add_evaluations()
        self._moved_at = event.at
        return [Record(f"site {event.site} is back"), Wake()]

    def _evicted(self, event: SiteEvicted) -> list[Instruction]:
        site = self.state.sites[event.site]
        site.state, site.last_error = SiteState.EVICTED, event.reason
        self.state.tasks = {key: task for key, task in self.state.tasks.items() if task.site != event.site}
        instructions: list[Instruction] = [Record(f"site {event.site} is evicted: {event.reason}", trouble=True)]
        if self.state.phase not in (Phase.GROUPING, Phase.AGGREGATING):
            if dropped := self.state.updates.get(event.site):
                instructions.append(Discard(dropped.artifact))
            self._exclude(event.site)
        self._moved_at = event.at
        return [*instructions, Wake()]

    def _exclude(self, site: str) -> None:
        """Takes a site and what it delivered out of what is being collected."""
        state = self.state
        state.cohort = [name for name in state.cohort if name != site]
        state.target = min(state.target, len(state.cohort))
        for answers in (state.updates, state.coresets):
            answers.pop(site, None)
        if not state.cells:
            # Sums of cells are folded as they come: what a site has added to them stays for this pass.
            state.reports.pop(site, None)

    def _trainers(self) -> list[str]:
        # A site that has just restarted holds its name and its rows while it loads its model: it is drawn all the
        # same, or a crash would decide who takes part.
        return sorted(s.name for s in self.state.sites.values() if s.live and s.rows and not s.shut_out)

    def _eligible(self) -> list[str]:
        """Sites that a round may draw: in one-shot runs those that the selection gave rows."""
        anyone = self.spec.schedule == "per-round"
        return [site for site in self._trainers() if anyone or site in self.state.coresets]

    def _evaluators(self) -> list[str]:
        return sorted(s.name for s in self.state.sites.values() if s.state is SiteState.ENROLLED and s.evaluates)

    # From enrolment to the first round.

    def _start_if_ready(self, at: float) -> list[Instruction]:
        state = self.state
        if state.phase is not Phase.ENROLLING:
            return []
        sites = self.spec.min_sites - len(self._trainers())
        evaluators = self.spec.min_evaluators - len(self._evaluators())
        missing = [f"{sites} more site{'s' * (sites > 1)}"] if sites > 0 else []
        missing += [f"{evaluators} more evaluator{'s' * (evaluators > 1)}"] if evaluators > 0 else []
        if missing or 0 not in state.adapters:
            state.message = f"waiting for {' and '.join(missing) or 'the initial adapter'}"
            return []
        state.started_at = at
        pool = sum(state.sites[name].rows for name in self._trainers())
        note = Record(f"the run starts with {len(self._trainers())} sites that hold {pool} rows")
        self._add_evaluations()
        first = self._open_selection() if self.spec.schedule == "one-shot" else self._open_round(at)
        return [note, WriteCheckpoint(), *first, Wake()]

    # Selection.

    def _open_selection(self) -> list[Instruction]:
        """Asks the trainers (one-shot) or the round's cohort (per-round) for reports, if the strategy needs any."""
        state = self.state
        state.phase = Phase.SELECTING
        state.reports, state.report_tasks, state.coresets = {}, {}, {}
        state.selection_pass, state.centres, state.cells = 0, "", ""
        sites = self._trainers()
        if self.spec.schedule == "per-round":
            sites = self._draw(sites)
        if not self._needs_reports:
            self._collect(sites, len(sites))
            state.reports = dict.fromkeys(sites, "")
            return self._grouped()
        self._ask(sites, len(sites))
        return []

    def _collect(self, cohort: list[str], target: int) -> None:
        """Begins to collect answers; `target` of them close the phase."""
        state = self.state
        state.cohort, state.target = cohort, target
        state.empty, state.failed, state.deadline_reached = [], [], False

    def _ask(self, cohort: list[str], target: int) -> None:
        self._collect(cohort, target)
        self._give_tasks(cohort)
        self._describe()

    def _give_tasks(self, sites: list[str]) -> None:
        """Gives `sites` the task of the open selection or round."""
        state = self.state
        if state.phase is Phase.TRAINING:
            kind, name = TaskKind.TRAIN, ""
        else:
            kind, name = TaskKind.SELECT, ""
            if state.selection_pass:
                # The centres are part of the task's name: a selection that starts anew must not meet answers to others.
                digest = hashlib.sha256(state.centres.encode()).hexdigest()[:12]
                name = f"{state.round}.{state.selection_pass}-{digest}"
        for site in sites:
            self._add_task(kind, state.round, site, name)

    def _describe(self) -> None:
        """Says for people what the open selection or round waits for."""
        state = self.state
        collection = Collection.of(state)
        if collection is None:
            return
        if collection.kind is TaskKind.TRAIN:
            where = f"round {state.round} of {self.spec.rounds}"
        else:
            where = "selecting" + (f", pass {state.selection_pass + 1}" if state.selection_pass else "")
        state.message = f"{where}: {collection.message}"

    def _grouped(self) -> list[Instruction]:
        state = self.state
        state.phase = Phase.GROUPING
        state.message = f"selecting: deciding on the reports of {len(state.reports)} sites"
        return [self._selection()]

    def _selection(self) -> Select:
        return Select(self.state.round, tuple(sorted(self.state.reports)))

    def _reported(self, event: ReportReceived) -> list[Instruction]:
        task = self.state.tasks.pop(event.task_id, None)
        if task is None:
            return []
        report = event.report
        if isinstance(report, pb.CellReport):
            # Folded as they come: what is kept does not grow with the sites, and integers add up in any order.
            self.state.cells = packed(added(self.state.cells_now, report))
            report = without_sums(report)
        self.state.reports[task.site] = packed(report)
        self.state.report_tasks[task.site] = task.id
        self._moved_at = event.at
        return []

    def _pass_opened(self, event: PassOpened) -> list[Instruction]:
        """Asks the sites that answered the last pass; who dropped out stays out of this selection."""
        state = self.state
        if state.phase is not Phase.GROUPING or (event.round, event.done) != (state.round, state.selection_pass):
            return []
        state.phase = Phase.SELECTING
        sites = sorted(state.reports)
        state.selection_pass += 1
        state.centres, state.cells = packed(event.centres), ""
        state.reports, state.report_tasks = {}, {}
        self._ask(sites, len(sites))
        return [Wake()]

    def _selected(self, event: SelectionMade) -> list[Instruction]:
        state = self.state
        if state.phase is not Phase.GROUPING or event.round != state.round:
            return []
        # Whoever was shut out while the strategy was at work.
        chosen = {site: coreset for site, coreset in sorted(event.coresets.items()) if not state.sites[site].shut_out}
        state.coresets = {site: packed(coreset) for site, coreset in chosen.items()}
        notes: list[Instruction] = [Record(note) for note in event.notes]
        notes.append(Record(f"selection: {len(state.coresets)} of {len(state.reports)} sites have rows to train on"))
        state.reports, state.centres, state.cells = {}, "", ""
        if self.spec.schedule == "per-round":
            return [*notes, *self._issue_training(sorted(state.coresets), event.at), Wake()]
        if not state.coresets:
            return [
                *notes,
                *self._end(Phase.FAILED, "the selection chose no row of any site; give it a --budget", event.at),
            ]
        return [*notes, *self._open_round(event.at), Wake()]

    # Rounds.

    def _open_round(self, at: float) -> list[Instruction]:
        state = self.state
        state.round += 1
        return self._fill_round(at)

    def _fill_round(self, at: float) -> list[Instruction]:
        """Draws the cohort of the open round; waits, with a message, while nobody lives who could be in it."""
        state = self.state
        state.phase = Phase.TRAINING
        state.round_opened_at = at
        state.updates = {}
        self._collect([], 0)
        eligible = self._eligible()
        state.wanted = cohort_size(len(eligible), self.spec.cohort_fraction)
        if not eligible:
            return self._waits()
        if self.spec.schedule == "per-round":
            return self._open_selection()
        return self._issue_training(self._draw(eligible), at)

    def _draw(self, sites: list[str]) -> list[str]:
        """The round's cohort out of `sites`, with those that are drawn in excess; never fewer than the quorum."""
        wanted = self.state.wanted
        size = max(math.ceil(wanted * (1 + self.spec.oversample)), self.spec.quorum_of(wanted))
        return draw(sites, size, seed=self.spec.seed, round_number=self.state.round)

    def _issue_training(self, cohort: list[str], at: float) -> list[Instruction]:
        state = self.state
        state.phase = Phase.TRAINING
        self._ask(cohort, min(len(cohort), state.wanted))
        if not cohort:
            return [Record(f"round {state.round}: no row was selected, the adapter stays as it is"), *self._close(at)]
        return [Record(f"round {state.round} of {self.spec.rounds} opens with {listed(cohort)}")]

    def _updated(self, event: UpdateReceived) -> list[Instruction]:
        state = self.state
        task = state.tasks.get(event.task_id)
        if task is None:
            return []
        del state.tasks[task.id]
        state.updates[task.site] = Update(artifact=event.artifact, samples=event.samples, loss=event.loss)
        self._moved_at = event.at
        return []

    def _dropped(self, event: UpdateDamaged) -> list[Instruction]:
        if self.state.phase is not Phase.AGGREGATING or not self.state.updates.pop(event.site, None):
            return []
        message = f"round {self.state.round} goes on without the update of site {event.site}: {event.reason}"
        return [Record(message, trouble=True)]

    def _failed(self, event: TaskFailed) -> list[Instruction]:
        task = self.state.tasks.pop(event.task_id, None)
        if task is None:
            return []
        self.state.sites[task.site].last_error = event.reason
        if task.kind is not TaskKind.EVALUATE:
            self.state.failed.append(task.site)
        note = Record(f"site {task.site} failed its {task.kind} task: {event.reason}", trouble=True)
        self._moved_at = event.at
        return [note]

    def _rejected(self, event: ResultRejected) -> list[Instruction]:
        task = self.state.tasks.get(event.task_id)
        if task is None:
            return []
        site = self.state.sites[task.site]
        site.rejections += 1
        if site.rejections < _QUARANTINE_AFTER:
            return self._failed(TaskFailed(event.at, event.task_id, event.reason))
        site.quarantined, site.last_error = True, event.reason
        del self.state.tasks[task.id]
        self._exclude(site.name)
        text = f"site {site.name} is quarantined after {site.rejections} rejected results ({event.reason})"
        self._moved_at = event.at
        return [Record(text, trouble=True)]

    def _nothing_to_give(self, event: NothingToGive) -> list[Instruction]:
        task = self.state.tasks.pop(event.task_id, None)
        if task is None:
            return []
        self.state.empty.append(task.site)
        note = Record(f"site {task.site} has nothing to train on in round {task.round}: its picks name no row")
        self._moved_at = event.at
        return [note]

    def _close(self, at: float) -> list[Instruction]:
        state = self.state
        state.phase = Phase.AGGREGATING
        state.message = f"round {state.round}: folding {len(state.updates)} updates"
        return [Aggregate(state.round)]

    def _aggregated(self, event: RoundAggregated) -> list[Instruction]:
        state = self.state
        if state.phase is not Phase.AGGREGATING:
            return []
        samples = sum(update.samples for update in state.updates.values())
        loss = sum(update.samples * update.loss for update in state.updates.values())
        closed = ClosedRound(
            round=state.round,
            cohort=state.cohort,
            contributions={site: update.samples for site, update in sorted(state.updates.items())},
            loss=loss / samples if samples else 0.0,
            seconds=event.at - state.round_opened_at,
        )
        state.closed_rounds.append(closed)
        state.adapters[state.round] = event.adapter
        state.updates = {}
        kept = {*self.evaluation_rounds(), state.round}
        state.adapters = {number: adapter for number, adapter in state.adapters.items() if number in kept}
        self._add_evaluations()
        note = Record(
            f"round {state.round} closed with {len(closed.contributions)} updates over {samples} samples"
            + (f", training loss {closed.loss:.4f}" if samples else "")
        )
        return [note, WriteCheckpoint(), *self._after_round(event.at), Wake()]

    def _after_round(self, at: float) -> list[Instruction]:
        state = self.state
        recent = state.closed_rounds[-_FUTILE_ROUNDS:]
        # Per-round selection may rightly choose nobody; a round is futile only when tasks were given and all failed.
        if len(recent) == _FUTILE_ROUNDS and all(closed.cohort and not closed.contributions for closed in recent):
            return self._end(Phase.FAILED, f"no site delivered an update in {_FUTILE_ROUNDS} rounds running", at)
        if state.round < self.spec.rounds:
            return self._open_round(at)
        if not any(closed.contributions for closed in state.closed_rounds):
            return self._end(Phase.FAILED, "no site delivered an update in any round; the adapter is untrained", at)
        state.phase = Phase.FINISHING
        state.message = "waiting for the last evaluations"
        return self._advance(at)

    # Evaluation.

    def _add_evaluations(self) -> None:
        state = self.state
        if not state.started_at or state.phase.over:
            return
        for site in self._evaluators():
            for number in self.evaluation_rounds():
                if site not in state.evaluations.get(number, {}):
                    self._add_task(TaskKind.EVALUATE, number, site)

    def _evaluated(self, event: EvaluationReceived) -> list[Instruction]:
        state = self.state
        task = state.tasks.pop(event.task_id, None)
        if task is None:
            return []
        state.evaluations.setdefault(task.round, {})[task.site] = event.evaluation
        rows = max(event.evaluation.rows, 1)
        loss = event.evaluation.loss_sum / max(event.evaluation.tokens, 1)
        note = Record(
            f"{'before the first round' if task.round == 0 else f'after round {task.round}'}, {task.site} measures "
            f"loss {loss:.4f} and Rouge-L {event.evaluation.rouge_l_sum / rows:.4f} on {event.evaluation.rows} rows"
        )
        self._moved_at = event.at
        return [note]

    # What follows from what has come in.

    def advance(self) -> list[Instruction]:
        """What follows from the events that were applied; costs as much as one look at all sites."""
        at, self._moved_at = self._moved_at, None
        return [] if at is None else [*self._start_if_ready(at), *self._advance(at)]

    def _advance(self, at: float) -> list[Instruction]:
        """Moves on when the open phase has collected enough."""
        state = self.state
        if state.phase is Phase.FINISHING and not self._open(TaskKind.EVALUATE):
            self._withdraw(TaskKind.EVALUATE)
            return self._end(Phase.COMPLETED, f"{self.spec.rounds} rounds are done", at)
        collection = Collection.of(state)
        if collection is None:
            return []
        if collection.complete:
            self._withdraw(collection.kind)
            if collection.kind is TaskKind.SELECT:
                return [*self._grouped(), Wake()]
            return [*self._close(at), Wake()]
        if collection.short:
            return self._fill_up(collection, at)
        self._describe()
        return []

    def _fill_up(self, collection: Collection, at: float) -> list[Instruction]:
        """Asks others in the place of sites that are away: the quorum is wanted, whoever makes it up."""
        state = self.state
        training = collection.kind is TaskKind.TRAIN
        if (training and self.spec.schedule == "per-round") or state.selection_pass:
            # Others have no coreset yet, or no part in the passes before: all of it anew, unless something came.
            if not collection.answered and not collection.failed and self._trainers():
                self._withdraw(collection.kind)
                return self._fill_round(at) if training else self._open_selection()
            spare = []
        else:
            able = self._eligible() if training else self._trainers()
            spare = [site for site in able if site not in collection.answered | collection.failed]
        if not state.cohort:
            return self._fill_round(at) if spare else self._waits()
        wanted = max(collection.target, collection.quorum) - len(collection.answered)
        others = draw(spare, wanted, seed=self.spec.seed, round_number=state.round)
        state.cohort = sorted({*state.cohort, *others})
        self._give_tasks(others)
        waits = self._waits()
        if others:
            return [Record(f"asked in the place of {listed(collection.away)}: {listed(others)}"), Wake()]
        return waits

    def _waits(self) -> list[Instruction]:
        before = self.state.message
        self._describe()
        return [Record(self.state.message, trouble=True)] if self.state.message != before else []

    def _deadline_reached(self, event: DeadlineReached) -> list[Instruction]:
        state = self.state
        collection = Collection.of(state)
        if event.opening != state.opening or collection is None or state.deadline_reached:
            return []
        state.deadline_reached = True
        note = Record(f"the deadline of {self.spec.deadline:g} s is reached; {state.message}", trouble=True)
        self._moved_at = event.at
        return [note]

    def _retried(self, event: RetryDue) -> list[Instruction]:
        state = self.state
        collection = Collection.of(state)
        if event.opening != state.opening or collection is None or not collection.short:
            return []
        again = sorted(site for site in collection.failed if state.sites[site].live)
        state.failed = [site for site in state.failed if site not in again]
        self._give_tasks(again)
        self._describe()
        return [Record(f"asked again for want of a quorum: {listed(again)}"), Wake()] if again else []

    # What operators say.

    def _paused(self, event: RunPaused) -> list[Instruction]:
        if self.state.phase.over:
            return []
        self.state.paused = event.reason
        return [Record(f"the run is paused: {event.reason}", trouble=True)]

    def _resumed(self, event: RunResumed) -> list[Instruction]:
        if self.state.paused is None:
            return []
        self.state.paused = None
        return [Record(f"the run goes on{f': {event.reason}' * bool(event.reason)}"), Wake()]

    def _stopped(self, event: RunStopped) -> list[Instruction]:
        return [] if self.state.phase.over else self._end(Phase.STOPPED, event.reason, event.at)

    def _end(self, phase: Phase, message: str, at: float) -> list[Instruction]:
        state = self.state
        state.phase, state.message, state.ended_at = phase, message, at
        dropped = [Discard(update.artifact) for update in state.updates.values()]
        state.tasks, state.updates, state.paused = {}, {}, None
        verb = {Phase.COMPLETED: "is complete", Phase.STOPPED: "is stopped"}.get(phase, "failed")
        note = Record(f"the run {verb}: {message}", trouble=phase is not Phase.COMPLETED)
        return [note, *dropped, WriteCheckpoint(), Wake()]

    def _open(self, kind: TaskKind) -> bool:
        """Whether a live site still has a task of this kind."""
        return any(task.kind is kind and self.state.sites[task.site].live for task in self.state.tasks.values())

    def _withdraw(self, kind: TaskKind) -> None:
        self.state.tasks = {key: task for key, task in self.state.tasks.items() if task.kind is not kind}

    def _add_task(self, kind: TaskKind, number: int, site: str, name: str = "") -> None:
        task = Task(id=f"{kind}/{name or number}/{site}", kind=kind, round=number, site=site)
        self.state.tasks.setdefault(task.id, task)

    def _is_last(self, number: int) -> bool:
        return self.state.phase is Phase.FINISHING and number == self.state.round
