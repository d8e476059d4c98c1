"""The run as a pure state machine: `apply` changes the state, `advance` moves on, both say what should be done."""

from __future__ import annotations

from fedhds_server.run import membership, rounds, stages
from fedhds_server.run.base_model import model_confirmed
from fedhds_server.run.events import (
    AdapterDrawn,
    DeadlineReached,
    DrawAdapter,
    Event,
    FinalDelivered,
    Instruction,
    ModelConfirmed,
    Record,
    Resolve,
    ResultReceived,
    ResultRejected,
    RetryDue,
    RunFailed,
    RunPaused,
    RunResumed,
    RunRolledBack,
    RunStopped,
    SiteConnected,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteRegistered,
    SiteRevoked,
    SiteSilent,
    StageResolved,
    TaskFailed,
    Wake,
    WriteCheckpoint,
)
from fedhds_server.run.state import Phase, RunState, Task
from fedhds_server.workflows import TASK_KINDS


class RunMachine:
    """Drives one `RunState`.

    A result that comes too late, twice, or from a site that the stage no longer counts changes nothing.
    """

    def __init__(self, state: RunState) -> None:
        self.state = state
        # Time of the last event from which more may follow.
        self._moved_at: float | None = None

    def next_task(self, site: str) -> Task | None:
        """The open task that `site` should do now."""
        order = list(TASK_KINDS)
        own = [task for task in self.state.tasks.values() if task.site == site]
        return min(own, key=lambda task: (order.index(task.kind), task.round_number), default=None)

    def pending(self) -> list[Instruction]:
        """Instructions whose answers the state still waits for, after a restart."""
        state = self.state
        if state.manifest and 0 not in state.adapters and not state.phase.over:
            return [] if state.needs_first_values else [DrawAdapter()]
        if state.stage is not None and state.stage.closed:
            return [Resolve(state.stage.name)]
        return [WriteCheckpoint()] if state.adapters else []

    def handle(self, event: Event) -> list[Instruction]:
        """Applies one event and moves on."""
        return [*self.apply(event), *self.advance()]

    def advance(self) -> list[Instruction]:
        """Moves on after one event, or after the last of several that came together."""
        at, self._moved_at = self._moved_at, None
        return [] if at is None else rounds.advance(self.state, at)

    def apply(self, event: Event) -> list[Instruction]:
        """Applies one event; `advance` must follow."""
        state = self.state
        self._moved_at = getattr(event, "at", self._moved_at)
        match event:
            case SiteConnected():
                return membership.connected(state, event)
            case SiteRegistered():
                instructions = membership.registered(state, event)
                rounds.add_evaluations(state)
                return instructions
            case SiteHeard():
                instructions = membership.heard(state, event)
                rounds.add_evaluations(state)
                return instructions
            case SiteSilent() | SiteLeft():
                return membership.gone(state, event)
            case SiteEvicted():
                return membership.evicted(state, event)
            case SiteRevoked():
                return membership.revoked(state, event)
            case ModelConfirmed():
                return model_confirmed(state, event)
            case AdapterDrawn():
                state.adapters[0] = event.adapter
                return []
            case ResultReceived():
                return stages.result_received(state, event)
            case ResultRejected():
                return stages.result_rejected(state, event)
            case TaskFailed():
                return stages.task_failed(state, event)
            case StageResolved():
                closed = state.stage is not None and state.stage.closed and state.stage.name == event.stage
                return rounds.resolved(state, event.outcome, event.at) if closed else []
            case DeadlineReached():
                return self._deadline_reached(event)
            case RetryDue():
                return stages.retry(state) if state.stage and state.stage.name == event.stage else []
            case RunPaused():
                return self._paused(event)
            case RunResumed():
                return self._resumed(event)
            case RunRolledBack():
                return rounds.rolled_back(state, event)
            case RunStopped():
                return [] if state.phase.over else rounds.end(state, Phase.STOPPED, event.reason, event.at)
            case RunFailed():
                return [] if state.phase.over else rounds.end(state, Phase.FAILED, event.reason, event.at)
            case FinalDelivered():
                state.sites[event.site].delivered = True
                return [Wake()]

    def _deadline_reached(self, event: DeadlineReached) -> list[Instruction]:
        stage = self.state.stage
        if stage is None or stage.closed or stage.deadline_reached or stage.name != event.stage:
            return []
        stage.deadline_reached = True
        message = f"the deadline of {self.state.spec.rounds.deadline:g} s is reached; {self.state.message}"
        return [Record(message, trouble=True)]

    def _paused(self, event: RunPaused) -> list[Instruction]:
        if self.state.phase.over:
            return []
        self.state.paused = event.reason
        return [Record(f"the run is paused: {event.reason}", trouble=True), Wake()]

    def _resumed(self, event: RunResumed) -> list[Instruction]:
        if self.state.paused is None:
            return []
        self.state.paused = None
        return [Record(f"the run goes on{f': {event.reason}' * bool(event.reason)}"), Wake()]
