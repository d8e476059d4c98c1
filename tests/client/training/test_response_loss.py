"""The loss on responses and generation see the whole adapter: also what lies outside the base model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch.nn import functional

from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.evaluation.generation import generate
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.tiny import make_model

ROWS = [
    Encoded([5, 9, 40, 77, 12], [False, False, True, True, True], answer_start=2, end=None, truncated=False),
    Encoded([7, 8, 33], [True, True, True], answer_start=0, end=None, truncated=False),
]


@pytest.fixture
def prompted(tmp_path: Path) -> InferenceModel:
    """A tiny Llama behind a prompt of four embeddings, which change what it says."""
    base = load_base_model(str(make_model(tmp_path)), device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            # Else a random model repeats its last token, whatever was before it.
            if "_proj" in name:
                parameter.mul_(10)
    module: Any = get_peft_model(base.model, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    return InferenceModel(base, module)


def test_the_loss_under_a_prompt_is_that_of_pefts_wrapper(prompted: InferenceModel) -> None:
    expected = 0.0
    with torch.no_grad():
        for row in ROWS:
            logits = prompted.module(input_ids=torch.tensor([row.input_ids])).logits[0, 4:]
            start = max(row.answer_start, 1)
            targets = torch.tensor(row.input_ids[start:])
            expected += float(functional.cross_entropy(logits[start - 1 : -1], targets, reduction="sum"))
        total, tokens = ResponseLoss(prompted)(ROWS)
        without, _ = ResponseLoss(InferenceModel(prompted.base, prompted.base.model))(ROWS)
    assert tokens == 5
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(total) != pytest.approx(float(without), rel=1e-3)


# PEFT says so of every prompt; the model then counts positions from the prompt on.
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_answers_under_a_prompt_are_those_of_pefts_wrapper(prompted: InferenceModel) -> None:
    prompter = Prompter(prompted.tokenizer, max_length=64)
    own = prompted.base.model.generation_config
    rows = [Row(number, f"Say {word}.", "", "x") for number, word in enumerate(("cat", "hippopotamus"))]
    answers = [answer.text for answer in generate(prompted, prompter, rows, 8)]
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([prompter.encode_prompt(row, reserve=8).input_ids])
        out = prompted.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        assert prompted.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
    assert prompted.base.model.generation_config is own
    plain = generate(InferenceModel(prompted.base, prompted.base.model), prompter, rows, 8)
    assert [answer.text for answer in plain] != answers
