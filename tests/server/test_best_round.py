"""Validation steers a run: which round is the best, when it stops early, and what waits for whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from fedhds.cli.status import _picture
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.observers.base import ObserverContext, Observers
from fedhds_server.observers.metrics_file import MetricsFile
from fedhds_server.rpc.federation import _done
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import AdapterDrawn, Discard, SiteHeard, SiteSilent, TaskFailed, WriteCheckpoint
from fedhds_server.run.state import RunState
from fedhds_server.run.validation import validation_loss
from fedhds_server.status import model_card_of, status_of
from fedhds_server.workflows import TASK_KINDS
from tests.support.machine import (
    aggregate,
    artifact,
    doing,
    evaluation,
    join,
    machine,
    notes,
    packed_any,
    select,
    update,
    validation,
    work,
)


def _run(losses: Sequence[float], **settings: object) -> RunMachine:
    """A run of one trainer and the validator v, which measures `losses`: before the first round and after each."""
    values = {"min_sites": 1, "rounds": 9, "rollback_on_loss": 0.0} | settings
    run = machine(**values)  # type: ignore[arg-type]
    join(run, "a")
    join(run, "v", 0, validation_rows=2)
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    validation(run, 0, "v", losses[0])
    for number, loss in enumerate(losses[1:], 1):
        _train(run, number)
        validation(run, number, "v", loss)
    return run


def _train(run: RunMachine, number: int) -> None:
    update(run, "a")
    aggregate(run, 100 + number)


def test_the_best_and_the_last_two_adapters_are_kept_and_no_other() -> None:
    run = _run([5.0, 3.0, 2.0, 4.0, 2.5])
    assert (run.state.best_round, run.state.round_number) == (2, 5)
    assert run.state.adapters == {number: artifact(100 + number) for number in (0, 2, 3, 4)}
    assert status_of(run.state, Path("/run")).best_round == 2


def test_a_better_round_is_written_down_and_the_one_before_goes() -> None:
    run = _run([5.0, 3.0, 4.0])
    _train(run, 3)
    assert (doing(run), run.state.message) == ("validating", "waiting for the validation of the last round")
    instructions = validation(run, 3, "v", 2.0)
    assert work(instructions) == [WriteCheckpoint(), Discard(artifact(101))]
    assert "after round 3, the validation loss is 2.0000, the lowest so far" in notes(instructions)
    assert (run.state.best_round, doing(run), run.state.round_number) == (3, "training", 4)


def test_equal_losses_keep_the_earlier_round() -> None:
    assert _run([5.0, 3.0, 3.0]).state.best_round == 1


def test_without_validating_sites_no_round_waits_and_none_is_the_best() -> None:
    run = machine(min_sites=1)
    join(run, "a")
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    _train(run, 1)
    assert (doing(run), run.state.best_round, run.state.validated_round) == ("training", None, 1)
    assert not status_of(run.state, Path("/run")).HasField("best_round")


@pytest.mark.parametrize(
    ("losses", "delta", "ends_after"),
    [
        ([5.0, 3.0, 3.5, 4.0], 0.0, 3),
        ([5.0, 3.0, 3.5, 2.9, 3.0, 3.0], 0.0, 5),
        # Better, but by less than is asked: such a round may be the best, and ends the run still.
        ([5.0, 3.0, 2.9, 2.8], 0.5, 3),
        ([1.0, 3.0, 2.9], 0.0, 2),
    ],
)
def test_it_stops_early(losses: list[float], delta: float, ends_after: int) -> None:
    settings = {"early_stop_patience": 2, "early_stop_min_delta": delta}
    run = _run(losses[:-1], **settings)
    assert doing(run) == "training"
    _train(run, ends_after)
    ended = validation(run, ends_after, "v", losses[-1])
    assert (doing(run), run.state.round_number) == ("completed", ends_after)
    assert run.state.best_round == min(range(len(losses)), key=losses.__getitem__)
    assert any(note.startswith("the run stops early: the validation loss has not improved") for note in notes(ended))
    assert run.state.end_message.startswith(f"{ends_after} of 9 rounds are done: the validation loss has not improved")


def test_patience_that_is_over_in_the_last_round_is_no_early_stop() -> None:
    run = _run([5.0, 3.0, 4.0, 4.0], early_stop_patience=2, rounds=3)
    assert run.state.end_message == "3 rounds are done"


def test_evaluation_never_steers() -> None:
    run = machine(min_sites=1, rounds=3, early_stop_patience=1, evaluate_every=1)
    join(run, "a")
    join(run, "v", 0, evaluates=True, validation_rows=2)
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    evaluation(run, 0, "v")
    validation(run, 0, "v", 5.0)
    for number, loss in ((1, 4.0), (2, 3.0), (3, 2.0)):
        _train(run, number)
        # Always the same: by these, the run would stop early, and the first round would be the best.
        evaluation(run, number, "v")
        validation(run, number, "v", loss)
    assert (doing(run), run.state.best_round) == ("completed", 3)
    status = status_of(run.state, Path("/run"))
    assert [line.metrics["loss"] for line in status.validations] == [5.0, 4.0, 3.0, 2.0]
    assert {line.metrics["loss"] for line in status.evaluations} == {2.0}


def test_the_best_adapter_is_evaluated_in_the_end() -> None:
    run = machine(min_sites=1, rounds=3, evaluate_every=0, rollback_on_loss=0.0)
    join(run, "a")
    join(run, "v", 0, evaluates=True, validation_rows=2)
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    for number, loss in enumerate((5.0, 1.0, 2.0, 3.0)):
        if number:
            _train(run, number)
        validation(run, number, "v", loss)
    assert set(run.state.tasks) == {f"evaluate/{number}/v" for number in (0, 1, 3)}


def test_a_lost_validator_holds_no_round_up_and_its_late_word_does_not_count() -> None:
    run = _run([5.0])
    _train(run, 1)
    assert doing(run) == "validating"
    run.handle(SiteSilent(9.0, "v"))
    assert (doing(run), run.state.round_number) == ("training", 2)
    run.handle(SiteHeard(9.5, "v"))
    assert validation(run, 1, "v", 0.5) == []
    assert run.state.best_round == 0
    _train(run, 2)
    validation(run, 2, "v", 1.0)
    assert run.state.best_round == 2


def test_a_failed_validation_holds_no_round_up() -> None:
    run = _run([5.0])
    _train(run, 1)
    run.handle(TaskFailed(9.0, "validate/1/v", "no memory"))
    assert (doing(run), run.state.best_round) == ("training", 0)


def test_a_validator_that_loads_its_model_again_is_waited_for() -> None:
    run = _run([5.0])
    run.state.sites["v"].state = type(run.state.sites["v"].state).CONNECTING
    _train(run, 1)
    assert doing(run) == "validating"


def test_rounds_compare_on_the_rows_of_the_same_sites() -> None:
    run = machine(min_sites=1, rounds=9)
    join(run, "a")
    join(run, "easy", 0, validation_rows=2)
    join(run, "hard", 0, validation_rows=2)
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    validation(run, 0, "easy", 1.0)
    validation(run, 0, "hard", 9.0)
    _train(run, 1)
    # The mean falls from 5.0 to 1.5 as hard is away; on the rows that measured both, the loss rose.
    run.handle(SiteSilent(9.0, "hard"))
    validation(run, 1, "easy", 1.5)
    assert (validation_loss(run.state, 0), validation_loss(run.state, 1)) == (5.0, 1.5)
    assert run.state.best_round == 0


def test_the_mean_depends_on_no_order_and_weighs_tokens() -> None:
    losses = {}
    for order in (("x", "y", "z"), ("z", "x", "y")):
        run = machine(min_sites=1)
        join(run, "a")
        for site in order:
            join(run, site, 0, validation_rows=2)
        run.handle(AdapterDrawn(2.0, artifact(100)))
        for site in order:
            validation(run, 0, site, {"x": 0.1, "y": 0.7, "z": 1e9 / 3}[site], {"x": 3, "y": 5, "z": 7}[site])
        losses[order] = validation_loss(run.state, 0)
    assert len(set(losses.values())) == 1
    assert losses["x", "y", "z"] == pytest.approx((0.1 * 3 + 0.7 * 5 + 7e9 / 3) / 15)


@pytest.mark.parametrize(("deliver", "number"), [("final", 2), ("best", 1)])
def test_sites_get_the_adapter_that_the_operator_wants(deliver: str, number: int) -> None:
    run = _run([5.0, 1.0, 2.0], rounds=2, deliver=deliver)
    assert doing(run) == "completed"
    done = _done(run.state, "a")
    assert done.adapter.digest == artifact(100 + number).digest
    assert f"| rounds | {number} of 2," in done.model_card
    assert artifact(100 + number) in run.state.downloads


@pytest.mark.parametrize("settings", [{"early_stop_patience": 1}, {"deliver": "best"}])
def test_a_run_that_validation_is_to_steer_waits_for_a_site_that_validates(settings: dict[str, object]) -> None:
    run = machine(**{"min_sites": 1} | settings)  # type: ignore[arg-type]
    join(run, "a")
    run.handle(AdapterDrawn(2.0, artifact(100)))
    assert doing(run) == "enrolling"
    assert "--validation-data or --holdout" in run.state.message
    join(run, "b", 5, validation_rows=2)
    assert doing(run) == "grouping"


def test_a_validation_is_bounded_by_what_its_site_declared_and_needs_a_loss() -> None:
    run = _run([5.0])
    _train(run, 1)
    task, kind = run.state.tasks["validate/1/v"], TASK_KINDS["validate"]
    loss = {"loss": pb.MetricSum(value_sum=4, weight=4)}
    rouge = {"rouge_l": pb.MetricSum(value_sum=1, weight=2)}

    def fault(rows: int, metrics: dict[str, pb.MetricSum]) -> tuple[str, str] | None:
        return kind.check(run.state, task, packed_any(pb.EvaluationResult(rows=rows, metrics=metrics)))

    assert fault(2, loss) is None
    assert fault(3, loss) == ("evaluation", "the validation claims 3 rows, the site declared 2 validation rows")
    assert fault(2, rouge) == ("evaluation", "the validation has no loss")


def test_card_and_status_show_validation_and_test_apart() -> None:
    run = _run([5.0, 1.0, 2.0])
    card = model_card_of(run.state, 1)
    assert "## Validation" in card
    assert "It was lowest after round 1; this is that adapter." in card
    assert "It was lowest after round 1; this adapter is after 2." in model_card_of(run.state)
    assert "| 1 | 2 | 1.0000 |" in card


async def test_observers_hear_of_validations_apart_from_evaluations(tmp_path: Path) -> None:
    run = machine(min_sites=1, rounds=3, evaluate_every=1)
    join(run, "a")
    join(run, "v", 0, evaluates=True, validation_rows=2)
    run.handle(AdapterDrawn(2.0, artifact(100)))
    select(run, "a")
    observers = Observers([MetricsFile(ObserverContext(tmp_path, run.state.spec))])
    observers.started(run.state)
    evaluation(run, 0, "v")
    validation(run, 0, "v", 5.0)
    for _ in range(2):
        observers.committed(run.state, [])
    await observers.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [(line["event"], line["round_number"], line["mean"]["loss"]) for line in lines] == [
        ("evaluation", 0, 2.0),
        ("validation", 0, 5.0),
    ]


def test_the_status_command_tells_them_apart() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(_picture(status_of(_run([5.0, 1.0, 2.0]).state, Path("/run"))))
    text = captured.get()
    assert "validation, on rows that are not those below: the loss is lowest after round 1; 2.0000 in round 2" in text
    assert "held-out rows" not in text


def test_a_state_that_knows_no_validation_goes_on() -> None:
    run = _run([5.0, 1.0])
    old = run.state.model_dump(mode="json")
    for key in ("validations", "validated_round", "best_round", "improved_round"):
        del old[key]
    for site in old["sites"].values():
        del site["validation_rows"]
    again = RunMachine(RunState.model_validate(old))
    _train(again, 2)
    assert (again.state.validated_round, again.state.round_number, again.state.best_round) == (2, 3, None)
