"""Rouge-L of unique words: that of the package `rouge` 1.0.1, with which FedHDS was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge import Rouge

from fedhds_client.data.row_formats import Row
from fedhds_client.evaluation import METRICS, EvaluatedBatch
from fedhds_client.evaluation.rouge_l_unique import rouge_l_unique

# Few words, which repeat; with full stops and spaces that make odd sentences.
texts = st.lists(st.sampled_from(["a", "b", "c", "the", "The", "d.", ".", " ", "e, f"]), max_size=14).map(" ".join)


@given(texts, texts)
def test_it_is_that_of_the_package(answer: str, reference: str) -> None:
    try:
        theirs = Rouge(metrics=["rouge-l"]).get_scores(answer, reference)[0]["rouge-l"]["f"]
    except ValueError:
        # A text without any sentence, for which the package has no value.
        assert not answer.strip(".") or not reference.strip(".")
        theirs = 0.0
    assert rouge_l_unique(answer, reference) == theirs


def test_words_that_repeat_count_once_and_case_counts() -> None:
    assert rouge_l_unique("yes yes yes", "yes") == pytest.approx(1.0, abs=1e-7)
    assert rouge_l_unique("Yes", "yes") == 0.0


def test_it_stands_long_answers() -> None:
    """The package recurses once for each word."""
    words = " ".join(map(str, range(1200)))
    assert rouge_l_unique(words, words) == pytest.approx(1.0, abs=1e-7)


def test_the_metric_takes_the_best_reference_and_no_thoughts() -> None:
    rows = [Row(0, "i", "", "a cat", references=("a cat", "the cat")), Row(1, "i", "", "a dog")]
    batch = EvaluatedBatch(rows, ["<think>so</think>the cat", "a dog"], loss_sum=6.0, tokens=4, answer_tokens=(5, 2))
    assert METRICS["rouge_l_unique"].measure(batch) == pytest.approx((2.0, 2), abs=1e-6)
    assert METRICS["answer_tokens"].measure(batch) == (7, 2)
