"""Taking the run back to an earlier adapter: by hand, or when the validation loss jumps. Pure functions."""

from __future__ import annotations

from fedhds.errors import RequestError, RunOver
from fedhds_server.run import validation
from fedhds_server.run.state import Phase, RunState

_MEASURING = ("evaluate", validation.KIND)


def previous_round(state: RunState) -> int | None:
    """The newest round with another adapter than the global one; None where there is none."""
    earlier = [number for number, adapter in state.adapters.items() if adapter != state.adapter]
    return max(earlier, default=None)


def target(state: RunState, wanted: int | None) -> int:
    """The round whose adapter the run goes back to, `wanted` or the one before the newest.

    Raises RunOver when the run has no round to go back from, RequestError for a round whose adapter is not kept.
    """
    if state.phase.over:
        raise RunOver(f"the run is over: {state.message}")
    previous = previous_round(state) if state.adapters else None
    if previous is None:
        raise RunOver("there is nothing to go back from: no round has changed the adapter yet")
    kept = sorted(number for number in state.adapters if number <= previous)
    if wanted is not None and wanted not in kept:
        rounds = ", ".join(map(str, kept))
        raise RequestError(f"the adapter of round {wanted} is not kept; the run can go back to round {rounds}")
    return previous if wanted is None else wanted


def jump(state: RunState) -> str:
    """Why the newest adapter, which is just validated, is given up; empty where it is not."""
    margin, number = state.spec.evaluation.rollback_on_loss, max(state.adapters)
    if not margin or number != state.validated_round or state.stage is not None:
        return ""
    rise = validation.rise(state, number)
    if rise is None or rise <= margin:
        return ""
    return (
        f"the validation loss is {rise:.4f} above that of round {state.best_round}, the lowest so far; "
        f"--rollback-on-loss is {margin:g}"
    )


def go_back(state: RunState, to: int) -> None:
    """Gives up all adapters after round `to`, with what measures them; the server optimizer goes back, too."""
    state.validated_round = max(state.validated_round, *state.adapters)
    state.adapters = {number: adapter for number, adapter in state.adapters.items() if number <= to}
    # Nothing is kept of an optimizer without slots, and before its first step.
    state.slots = state.slots_at.get(to, {})
    state.slots_at = {number: slots for number, slots in state.slots_at.items() if number < to}
    state.tasks = {
        task.id: task for task in state.tasks.values() if task.kind not in _MEASURING or task.round_number <= to
    }
    if state.best_round is not None and state.best_round > to:
        state.best_round = validation.best_of(state, state.adapters)
    if state.improved_round is not None and state.improved_round > to:
        state.improved_round = state.best_round


def keep_slots(state: RunState) -> None:
    """Remembers the optimizer's slots for the way back, before a round replaces them."""
    if state.slots:
        state.slots_at[max(state.adapters)] = state.slots


def drop_slots(state: RunState) -> None:
    """Forgets slots to whose round nothing leads back."""
    newest = max(state.adapters)
    state.slots_at = {at: slots for at, slots in state.slots_at.items() if at in state.adapters and at != newest}


def open_round(state: RunState) -> int | None:
    """The round that a rollback ends without a result; None between rounds."""
    closed = state.closed_rounds[-1].round_number if state.closed_rounds else 0
    return state.round_number if state.phase is Phase.RUNNING and state.round_number > closed else None
