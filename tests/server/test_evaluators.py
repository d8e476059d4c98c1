"""What evaluators say is bounded by what they declared, and a liar does not move the median."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.state import Evaluation, MetricSum, Task
from fedhds_server.status import means_of, medians_of, model_card_of, status_of
from fedhds_server.workflows.evaluation import EvaluationTasks
from tests.support.machine import join, machine, packed_any


def measured(loss: float, rows: int = 10) -> Evaluation:
    return Evaluation(rows=rows, metrics={"loss": MetricSum(value_sum=loss * rows, weight=rows)})


LIES = {
    "a": measured(1.0),
    "b": measured(1.2),
    "c": measured(1.1),
    "liar/1": measured(0.0),
    "liar/2": measured(0.0, 500),
}


def test_the_sites_of_one_certificate_are_one_evaluator_and_move_the_median_little() -> None:
    evaluators, medians = medians_of(LIES)
    assert evaluators == 4
    assert medians["loss"] == pytest.approx(1.05)
    assert means_of(LIES)[1]["loss"] < 0.1
    assert medians_of({"a": measured(1.5)}) == (1, {"loss": 1.5})


def test_status_and_card_have_the_median_beside_the_mean(tmp_path: Path) -> None:
    run = machine()
    join(run, "a")
    run.state.evaluations = {0: {"a": measured(3.0)}, 2: LIES}
    (before, after) = status_of(run.state, tmp_path / "none").evaluations
    assert (before.evaluators, after.evaluators) == (1, 4)
    assert [before.medians["loss"], after.medians["loss"]] == pytest.approx([3.0, 1.05])
    card = model_card_of(run.state)
    assert "median of evaluators" in card
    assert "| before | 10 | 3.0000 | 3.0000 |" in card
    assert "| 1.0500 |" in card
    run.state.evaluations = {0: {"a": measured(3.0)}}
    assert "median" not in model_card_of(run.state)


@pytest.mark.parametrize(
    ("rows", "weight", "fault"),
    [
        (5, 5.0, ""),
        (5, 5 * 1024.0, ""),
        (6, 6.0, "claims 6 rows, the site declared 5"),
        (10**9, 10.0, "claims 1000000000 rows"),
        (5, 5 * 1024 + 1.0, "weighs loss with 5121"),
    ],
)
def test_rows_and_weights_are_bounded_by_what_was_declared(rows: int, weight: float, fault: str) -> None:
    run = machine()
    join(run, "e", 0, evaluates=True)
    run.state.sites["e"].evaluation_rows = 5
    task = Task(id="evaluate/0/e", kind="evaluate", round_number=0, site="e")
    result = pb.EvaluationResult(rows=rows, metrics={"loss": pb.MetricSum(value_sum=1, weight=weight)})
    found = EvaluationTasks().check(run.state, task, packed_any(result))
    assert (found is None) if not fault else (found is not None and fault in found[1])
