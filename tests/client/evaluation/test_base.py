"""Sums of metrics: they combine by +, in any order, also when two sites measure different metrics."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedhds_client.evaluation import EvaluationSums

values = st.integers(0, 99).map(float)
# Integers, so that no rounding depends on the order.
sums = st.builds(
    EvaluationSums,
    rows=st.integers(0, 99),
    metrics=st.dictionaries(st.sampled_from(["loss", "rouge_l", "exact_match"]), st.tuples(values, values)),
)


@given(sums, sums, sums)
def test_sums_add_in_any_order(a: EvaluationSums, b: EvaluationSums, c: EvaluationSums) -> None:
    assert (a + b) + c == a + (b + c) == c + (b + a)
    assert a + EvaluationSums() == a


def test_means_of_sums() -> None:
    total = EvaluationSums(2, {"loss": (30.0, 10.0), "rouge_l": (0.5, 2.0)})
    total += EvaluationSums(2, {"loss": (30.0, 20.0), "rouge_l": (1.5, 2.0)})
    assert total.rows == 4
    assert total.means == {"loss": 2.0, "rouge_l": 0.5}


def test_a_metric_that_one_side_lacks_keeps_its_sum_and_of_nothing_the_mean_is_zero() -> None:
    total = EvaluationSums(1, {"loss": (3.0, 2.0)}) + EvaluationSums(1, {"rouge_l": (0.0, 0.0)})
    assert total == EvaluationSums(2, {"loss": (3.0, 2.0), "rouge_l": (0.0, 0.0)})
    assert total.means == {"loss": 1.5, "rouge_l": 0.0}
    assert EvaluationSums().means == {}
