"""Rouge-L: that of rouge_score on ASCII text, words in any script, the best of several references."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedhds_client.data.row_formats import Row
from fedhds_client.evaluation import METRICS, EvaluatedBatch
from fedhds_client.evaluation.rouge_l import rouge_l


@given(st.text(st.characters(max_codepoint=126)), st.text(st.characters(max_codepoint=126)))
def test_on_ascii_text_rouge_l_is_that_of_rouge_score(answer: str, reference: str) -> None:
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, [reference]) == theirs


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("мама мыла раму", "мама мыла раму", 1.0),
        ("мама мыла", "мама мыла раму", 0.8),
        ("我喜欢苹果", "我喜欢香蕉", 0.6),
        ("ฉันชอบ", "ฉันชอบ", 1.0),
        ("हिन्दी भाषा", "हिन्दी दिवस", 0.5),
        ("Café", "cafe\u0301", 1.0),
        ("γάτα", "σκύλος", 0.0),
        ("", "word", 0.0),
        ("!?", "!?", 0.0),
    ],
)
def test_words_of_any_script_count(answer: str, reference: str, expected: float) -> None:
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_the_best_reference_counts() -> None:
    assert rouge_l("the cat sat", ["a dog ran", "the cat sat", "the cat"]) == 1.0


def test_the_metric_sums_over_rows_and_takes_the_response_where_there_are_no_references() -> None:
    rows = [Row(0, "i", "", "a cat", references=("a cat", "the cat")), Row(1, "i", "", "a dog"), Row(2, "i", "", "x")]
    batch = EvaluatedBatch(rows, ["the cat", "a dog", "y"], loss_sum=6.0, tokens=4)
    assert METRICS["rouge_l"].measure(batch) == (2.0, 3)
    assert METRICS["loss"].measure(batch) == (6.0, 4)


def test_thoughts_are_no_part_of_an_answer() -> None:
    thinking = "<think>\neight legs, so\n</think>\n\nsixteen"
    rows = [Row(0, "i", "", thinking, references=(thinking,)), Row(1, "i", "", "sixteen")]
    batch = EvaluatedBatch(rows, ["sixteen", "<think>\n\n</think>\n\nsixteen"], loss_sum=0.0, tokens=1)
    assert METRICS["rouge_l"].measure(batch) == (2.0, 2)
