"""What validation decides: which round is the best one, and whether the run stops early. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedhds_server.run.state import Phase, RunState

KIND = "validate"


def validation_loss(state: RunState, round_number: int, sites: Iterable[str] | None = None) -> float | None:
    """Mean loss of a round's adapter on the validation rows of `sites` (None: all), in nats per token.

    None where none of them measured it.
    """
    sums = state.validations.get(round_number, {})
    wanted = sums.keys() if sites is None else sums.keys() & set(sites)
    losses = [sums[site].metrics["loss"] for site in wanted if "loss" in sums[site].metrics]
    if not losses:
        return None
    # Rounded once, so that the order of sites does not matter.
    return math.fsum(loss.value_sum for loss in losses) / math.fsum(loss.weight for loss in losses)


def missing_validations(state: RunState) -> list[tuple[str, int, str]]:
    """Task id, round and site of every validation that should be asked for and has not come."""
    if not state.started_at or state.phase is not Phase.RUNNING:
        return []
    return [
        (f"{KIND}/{number}/{site}", number, site)
        for number in _open_rounds(state)
        for site in state.validators
        if site not in state.validations.get(number, {})
    ]


def is_validating(state: RunState) -> bool:
    """Whether a live site still validates a closed round."""
    return any(task.kind == KIND and state.sites[task.site].live for task in state.tasks.values())


def settle(state: RunState) -> list[str]:
    """Decides on all rounds that no live site still validates, oldest first; lines for the journal.

    What sites that are gone might yet say of these rounds does not count.
    """
    notes: list[str] = []
    for number in _open_rounds(state):
        own = [task for task in state.tasks.values() if task.kind == KIND and task.round_number == number]
        if any(state.sites[task.site].live for task in own):
            break
        for task in own:
            del state.tasks[task.id]
        state.validated_round = number
        loss = validation_loss(state, number)
        if loss is None:
            continue
        better = _is_better(state, number, state.best_round, 0.0)
        if better:
            state.best_round = number
        if _is_better(state, number, state.improved_round, state.spec.evaluation.early_stop_min_delta):
            state.improved_round = number
        when = f"after round {number}" if number else "before the first round"
        notes.append(f"{when}, the validation loss is {loss:.4f}" + ", the lowest so far" * better)
    return notes


def rise(state: RunState, number: int) -> float | None:
    """By how much a round's loss is above that of the best one, on the rows of the same sites; None: not known."""
    if state.best_round is None or number not in state.validations:
        return None
    both = state.validations[number].keys() & state.validations[state.best_round].keys()
    mine, best = (validation_loss(state, one, both or None) for one in (number, state.best_round))
    return None if mine is None or best is None else mine - best


def best_of(state: RunState, rounds: Iterable[int]) -> int | None:
    """The round with the lowest loss among `rounds`; None where none of them has one."""
    best: int | None = None
    for number in sorted(rounds):
        if validation_loss(state, number) is not None and _is_better(state, number, best, 0.0):
            best = number
    return best


def early_stop(state: RunState) -> str:
    """Why the run ends before its last round; empty while it goes on."""
    spec = state.spec.evaluation
    if not spec.early_stop_patience or state.improved_round is None:
        return ""
    # Rounds that nobody could validate say nothing.
    since = sum(number > state.improved_round for number in state.validations)
    if since < spec.early_stop_patience:
        return ""
    delta = f" by more than {spec.early_stop_min_delta:g}" * bool(spec.early_stop_min_delta)
    return f"the validation loss has not improved{delta} since round {state.improved_round}"


def completed(state: RunState) -> str:
    """How many rounds are done, and why no more."""
    reason, count = early_stop(state), state.spec.rounds.count
    if state.round_number == count or not reason:
        return f"{count} rounds are done"
    return f"{state.round_number} of {count} rounds are done: {reason}"


def _open_rounds(state: RunState) -> list[int]:
    """Rounds with an adapter on which validation has not decided."""
    return sorted(number for number in state.adapters if number > state.validated_round)


def _is_better(state: RunState, number: int, best: int | None, delta: float) -> bool:
    """Whether a round's loss is lower than that of the best one by more than `delta`, on the rows of the same sites.

    Sites that measured only one of the two would shift the mean by what their rows are like.
    """
    if best is None:
        return True
    both = state.validations[number].keys() & state.validations[best].keys()
    mine, theirs = (validation_loss(state, one, both or None) for one in (number, best))
    return mine is not None and theirs is not None and mine < theirs - delta
