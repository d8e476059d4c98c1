"""The way back: by hand at any time, and when the validation loss jumps."""

from __future__ import annotations

from typing import Any

import pytest

from fedhds.errors import RequestError, RunOver
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run import rollback
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterUpdated,
    Discard,
    Instruction,
    RoundReport,
    RunRolledBack,
    StageResolved,
    WriteCheckpoint,
)
from fedhds_server.run.state import Phase, RunState, UpdateScore
from fedhds_server.workflows.training import recent_norms
from tests.support.machine import aggregate, artifact, join, notes, received, resolve, started, update, validation


def trained(run: RunMachine, number: int, *, slot: int | None = None) -> list[Instruction]:
    """Round `number` closes with the adapter of that number; both sites sent an update."""
    update(run, "a", 70)
    update(run, "b", 80)
    return resolve(run, AdapterUpdated(artifact(number), {"m": artifact(slot)} if slot else {}))


def back(run: RunMachine, to: int) -> list[Instruction]:
    return run.handle(RunRolledBack(9.0, to, "looks odd (eve)"))


def reloaded(run: RunMachine) -> RunMachine:
    """The run after a restart."""
    return RunMachine(RunState.model_validate_json(run.state.model_dump_json()))


def test_an_open_round_ends_and_the_next_starts_from_the_adapter_before() -> None:
    run = started(rounds=9)
    trained(run, 1, slot=51)
    trained(run, 2, slot=52)
    update(run, "a", 70)
    assert rollback.target(run.state, None) == 1
    instructions = back(run, 1)
    assert "the run is taken back to round 1: looks odd (eve)" in notes(instructions)
    assert WriteCheckpoint() in instructions
    assert {item.artifact for item in instructions if isinstance(item, Discard)} == {
        artifact(2),
        artifact(52),
        artifact(70),
    }
    run = reloaded(run)
    assert (run.state.adapter, run.state.slots, run.state.round_number) == (artifact(1), {"m": artifact(51)}, 4)
    assert set(run.state.tasks) == {"train/4/a", "train/4/b"}
    closed = run.state.closed_rounds[-1]
    assert (closed.round_number, closed.contributions) == (3, {})
    assert closed.unchanged == "taken back to round 1: looks odd (eve)"
    # What a site trained from the adapter that was given up comes too late.
    assert received(run, "train/3/b", pb.TrainResult(samples=5, update=artifact(80).to_proto()), artifact(80)) == []
    trained(run, 4, slot=54)
    assert (run.state.adapter, run.state.slots) == (artifact(4), {"m": artifact(54)})
    assert back(run, 1)
    assert (run.state.adapter, run.state.slots) == (artifact(1), {"m": artifact(51)})


def test_a_round_that_is_being_combined_ends_too_and_its_result_comes_too_late() -> None:
    run = started(rounds=9)
    trained(run, 1)
    update(run, "a", 70)
    update(run, "b", 80)
    assert run.state.stage is not None
    name = run.state.stage.name
    assert run.state.stage.closed
    back(run, 0)
    assert run.state.adapter == artifact(0)
    before = run.state.model_dump_json()
    run.handle(StageResolved(10.0, name, AdapterUpdated(artifact(2))))
    assert run.state.model_dump_json() == before


def test_a_finishing_run_ends_with_the_earlier_adapter_and_evaluates_it() -> None:
    run = started(rounds=2)
    join(run, "e", 0, evaluates=True)
    trained(run, 1)
    trained(run, 2)
    assert run.state.phase is Phase.FINISHING
    assert "evaluate/2/e" in run.state.tasks
    back(run, 1)
    assert (run.state.adapter, run.state.phase) == (artifact(1), Phase.FINISHING)
    assert set(run.state.tasks) == {"evaluate/0/e", "evaluate/1/e"}
    assert len(run.state.closed_rounds) == 2


def test_what_cannot_be_gone_back_to_is_refused_with_what_can() -> None:
    run = started(rounds=9, evaluate_every=2)
    with pytest.raises(RunOver, match="nothing to go back from"):
        rollback.target(run.state, None)
    for number in (1, 2, 3, 4):
        trained(run, number)
    assert rollback.target(run.state, 2) == 2
    for wanted in (1, 4, 5):
        with pytest.raises(RequestError, match=f"round {wanted} is not kept; .* round 0, 2, 3$"):
            rollback.target(run.state, wanted)
    run.state.phase = Phase.COMPLETED
    with pytest.raises(RunOver, match="is over"):
        rollback.target(run.state, 2)


def test_rounds_that_left_the_adapter_as_it_was_are_skipped() -> None:
    run = started(rounds=9)
    for number in (1, 2):
        trained(run, number)
    update(run, "a", 70)
    update(run, "b", 80)
    resolve(run, AdapterUpdated(artifact(2), report=RoundReport(unchanged="too few")))
    assert rollback.target(run.state, None) == 1


def guarded(losses: dict[int, float], **settings: Any) -> RunMachine:
    """A run whose site v validates the adapters of rounds with these losses."""
    run = started(rounds=len(losses) - 1 + 3, **settings)
    join(run, "v", 0, validation_rows=4)
    validation(run, 0, "v", losses[0])
    for number in list(losses)[1:]:
        trained(run, number, slot=50 + number)
        validation(run, number, "v", losses[number])
    return run


def test_a_round_whose_validation_loss_jumps_is_given_up() -> None:
    run = reloaded(guarded({0: 3.0, 1: 2.0, 2: 2.4, 3: 2.6}))
    # Within 0.5 of the best is noise, beyond it is not.
    assert (run.state.adapter, run.state.slots) == (artifact(2), {"m": artifact(52)})
    assert run.state.best_round == 1
    closed = run.state.closed_rounds[-1]
    assert closed.unchanged.startswith("given up for the adapter of round 2: the validation loss is 0.6000 above")
    assert closed.contributions == {"a": 5, "b": 5}
    # The run goes on from there.
    assert set(run.state.tasks) == {"train/4/a", "train/4/b"}
    trained(run, 4, slot=54)
    validation(run, 4, "v", 1.9)
    assert (run.state.adapter, run.state.best_round) == (artifact(4), 4)


def test_the_guard_can_be_off_and_needs_validation() -> None:
    assert guarded({0: 3.0, 1: 2.0, 2: 9.0}, rollback_on_loss=0.0).state.adapter == artifact(2)
    run = started(rounds=9)
    join(run, "e", 0, evaluates=True)
    trained(run, 1)
    assert run.state.adapter == artifact(1)


def test_a_last_round_that_is_given_up_ends_the_run_with_the_adapter_before() -> None:
    run = started(rounds=2)
    join(run, "v", 0, validation_rows=4)
    validation(run, 0, "v", 3.0)
    trained(run, 1)
    validation(run, 1, "v", 2.0)
    trained(run, 2)
    validation(run, 2, "v", 8.0)
    assert (run.state.phase, run.state.adapter) == (Phase.COMPLETED, artifact(1))


def test_going_back_forgets_a_best_round_after_it() -> None:
    run = guarded({0: 3.0, 1: 2.5, 2: 2.2, 3: 2.0})
    back(run, 2)
    assert (run.state.best_round, run.state.improved_round) == (2, 2)
    # What came after it is in the record, and steers nothing.
    assert set(run.state.validations) == {1, 2, 3}


def test_a_round_that_is_not_combined_says_why_and_counts_no_update() -> None:
    run = started(rounds=9)
    for number in (1, 2, 3):
        update(run, "a", 70)
        update(run, "b", 80)
        report = RoundReport(unchanged="krum needs 5")
        instructions = resolve(run, AdapterUpdated(artifact(0), report=report))
        wanted = f"round {number} is not combined, the adapter stays as it is: krum needs 5"
        assert wanted in notes(instructions)
        assert run.state.closed_rounds[-1].contributions == {}
    assert run.state.phase is Phase.FAILED
    assert run.state.message == "no update was combined in 3 rounds in a row: krum needs 5"


def test_norms_are_compared_over_rounds_that_train_the_same_tensors() -> None:
    run = started(rounds=20, aggregator="alternating")
    for number in range(1, 14):
        update(run, "a", 70)
        update(run, "b", 80)
        report = RoundReport(updates={"a": UpdateScore(norm=float(number))})
        resolve(run, AdapterUpdated(artifact(number), report=report))
    assert recent_norms(run.state, 15) == [{"a": float(number)} for number in (5, 7, 9, 11, 13)]
    assert recent_norms(run.state, 14) == [{"a": float(number)} for number in (4, 6, 8, 10, 12)]


def test_a_whole_run_without_rollback_ends_as_before() -> None:
    run = started(rounds=1)
    update(run, "a", 70)
    update(run, "b", 80)
    aggregate(run, 1)
    assert run.state.phase is Phase.COMPLETED
    assert run.state.slots_at == {}
