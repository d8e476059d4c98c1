"""Sketches of gradients: inner products of the whole ones, the same at every site."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhds.errors import TaskError
from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import BaseModel
from fedhds_client.selection.gradients import gradient_sketches
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.tiny import make_model, write_rows

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[AdapterModel, Prompter, Shard]]:
    make_model(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    base = BaseModel("m", model, tokenizer, 512, torch.float32, ())
    with Shard.open(write_rows(tmp_path / "rows.jsonl", {"cats": 3, "a longer topic": 3})) as shard:
        yield (
            AdapterModel(base, RunSpec.of(model="m", rounds=1, lora_rank=2)),
            Prompter(tokenizer, max_length=300),
            shard,
        )


def test_inner_products_of_sketches_are_those_of_gradients(parts: tuple[AdapterModel, Prompter, Shard]) -> None:
    model, prompter, shard = parts
    whole = []
    parameters = [each for each in model.module.parameters() if each.requires_grad]
    for row in shard:
        total, _ = ResponseLoss(model)([prompter.encode(row)])
        gradient = torch.cat([each.ravel() for each in torch.autograd.grad(total, parameters)])
        whole.append(torch.nn.functional.normalize(gradient, dim=0).numpy())
    exact = np.stack(whole) @ np.stack(whole).T
    sketches = gradient_sketches(model, prompter, shard, range(6), seed=7, dimension=4096).values
    assert sketches.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), 1, rtol=1e-5)
    assert np.abs(sketches @ sketches.T - exact).max() < 0.1
    assert exact.min() < 0.9
    assert all(each.grad is None for each in model.module.parameters())


def test_a_row_has_one_sketch_wherever_it_lies_and_the_seed_decides(
    parts: tuple[AdapterModel, Prompter, Shard],
) -> None:
    model, prompter, shard = parts
    whole = gradient_sketches(model, prompter, shard, range(6), seed=7, dimension=64)
    some = gradient_sketches(model, prompter, shard, [4, 1], seed=7, dimension=64)
    assert some.ids.tolist() == [4, 1]
    np.testing.assert_allclose(some.values, whole.values[[4, 1]], atol=1e-5)
    other = gradient_sketches(model, prompter, shard, [4, 1], seed=8, dimension=64)
    assert not np.allclose(other.values, some.values, atol=0.1)


def test_a_diverged_adapter_is_an_error(parts: tuple[AdapterModel, Prompter, Shard]) -> None:
    model, prompter, shard = parts
    with torch.no_grad():
        next(each for each in model.module.parameters() if each.requires_grad).fill_(float("nan"))
    with pytest.raises(TaskError, match="not finite"):
        gradient_sketches(model, prompter, shard, [0], seed=7, dimension=64)
