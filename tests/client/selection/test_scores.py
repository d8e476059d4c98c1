"""The scores of filters: what they say of rows, against plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhds.spec import FILTER_SPECS
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.features.extraction import Features
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import BaseModel
from fedhds_client.selection.scores import SCORES, ScoredRows
from tests.support.tiny import make_model, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScoredRows]:
    folder = tmp_path_factory.mktemp("scores")
    make_model(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "model")
    base = BaseModel("m", model, tokenizer, 512, torch.float32, ())
    unused: Any = None
    with Shard.open(write_rows(folder / "rows.jsonl", {"cats": 3, "a longer topic": 2})) as shard:
        prompter = Prompter(tokenizer, max_length=300)
        yield ScoredRows(shard, prompter, lambda: InferenceModel(base, model), lambda: unused)


def test_every_filter_has_a_score() -> None:
    assert list(SCORES) == list(FILTER_SPECS)


def test_alignment_is_what_the_prompt_takes_off_the_loss_of_the_answer(rows: ScoredRows) -> None:
    ids = np.array([4, 0, 2])
    scores = SCORES["alignment"](rows, ids)
    model: Any = rows.model().module

    def loss(tokens: list[int], start: int) -> float:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens])).logits[0]
        return float(functional.cross_entropy(logits[start - 1 : -1], torch.tensor(tokens[start:])))

    for number, score in zip(ids.tolist(), scores, strict=True):
        encoded = rows.prompter.encode(rows.shard[number])
        tokens, start = encoded.input_ids, encoded.answer_start
        alone = [tokens[0], *tokens[start:]]
        assert score == pytest.approx(loss(alone, 1) - loss(tokens, start), abs=1e-4)
    assert len(set(np.round(scores, 6))) > 1


def test_length_counts_the_tokens_of_the_answer(rows: ScoredRows) -> None:
    scores = SCORES["length"](rows, np.arange(5))
    answers = [len(rows.shard[number].response.encode()) + 1 for number in range(5)]
    np.testing.assert_allclose(2**scores, answers)


def test_duplicates_measure_the_distance_to_the_nearest_row_before() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1500, 6)).astype(np.float32)
    values[700] = 3 * values[20]
    features = Features(np.arange(1500), values)
    unused: Any = None
    ids = np.array([20, 700, *range(100, 600), *range(800, 1450)])
    scores = SCORES["duplicates"](ScoredRows(unused, unused, unused, lambda: features), ids)
    unit = values[ids].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for place in (2, 77, 1100):
        nearest = np.linalg.norm(unit[:place] - unit[place], axis=1).min()
        assert scores[place] == pytest.approx(np.log2(nearest), abs=1e-4)
    bins = FILTER_SPECS["duplicates"].bins(scores)
    # The first row of all has none before it, and a copy of it is in the lowest bin whatever its length is.
    assert (bins[0], bins[1]) == (255, 0)


def test_what_progress_raises_ends_the_computation(rows: ScoredRows) -> None:
    class Stopped(Exception):
        pass

    def stop(share: float) -> None:
        raise Stopped

    stopped = ScoredRows(rows.shard, rows.prompter, rows.model, rows.features, stop)
    with pytest.raises(Stopped):
        SCORES["alignment"](stopped, np.array([0]))
