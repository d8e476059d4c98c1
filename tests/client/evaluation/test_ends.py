"""A model that was trained on a chat template ends its answers where the template does, or where it is able to."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation.evaluate import evaluate
from fedhds_client.evaluation.generation import generate
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.models.untrained import can_say
from fedhds_client.training.loop import train
from tests.support.shared import shared
from tests.support.tiny import make_model

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALKS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xyz"}]},
    {
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "two"},
        ]
    },
]


def _folder(folder: Path, *, trained: bool) -> Path:
    """A tiny model with a ChatML template whose marks have rows of their own, or those that transformers makes."""
    make_model(folder, hidden=64)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=not trained)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _trained(folder: Path, rows: Path, **settings: Any) -> tuple[AdapterModel, Prompter, Shard]:
    spec = RunSpec.of(model="model", rounds=1, **settings)
    base = load_base_model(str(folder), device="cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AdapterModel(base, spec)
    prompter = Prompter(base.tokenizer, max_length=128, model=base.model)
    shard = Shard.open(rows)
    ids = range(len(shard))
    train(model, shard, ids, prompter, spec.training, seed=1, progress=lambda _: None, cancelled=lambda: False)
    return model, prompter, shard


@pytest.mark.parametrize("trained", [True, False])
def test_a_tuned_model_ends_its_answers(tmp_path: Path, trained: bool, caplog: pytest.LogCaptureFixture) -> None:
    folder, rows = _folder(tmp_path / "model", trained=trained), tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, TALKS)))
    model, prompter, shard = _trained(
        folder, rows, local_epochs=60, learning_rate=1e-2, batch_size=2, lora_rank=16, lora_dropout=0.0
    )
    mark, eos = model.tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    # The row of a mark that was added to the vocabulary cannot win: then the model learns to say EOS there.
    assert can_say(model.base.model, mark) is trained
    assert prompter.stop_ids == ((mark, eos) if trained else (eos, mark))
    assert ("cannot say <|im_end|>, which ends an answer" in caplog.text) is not trained
    assert ("The model learns to say </s> there" in caplog.text) is not trained
    with shard:
        # The tokens are the template's in both cases.
        assert all(prompter.encode(row).input_ids.count(mark) == len(row.messages) for row in shard)
        # The answer within a conversation was learned, too, with its end.
        earlier = replace(shard[1], messages=shard[1].messages[:2], response="one")
        answers = generate(model, prompter, [*shard, earlier], 40)
        assert [answer.text for answer in answers] == ["xyz", "two", "one"]
        result = evaluate(model, shard, prompter, max_new_tokens=40, batch_size=2)
    assert result.means["rouge_l"] == 1.0


def test_a_model_that_can_say_nothing_that_ends_an_answer_is_named_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load_base_model(str(_folder(tmp_path / "model", trained=False)), device="cpu")
    head = base.model.get_output_embeddings().weight
    with torch.no_grad():
        head[base.tokenizer.eos_token_id] = 0
    prompter = Prompter(base.tokenizer, max_length=128, model=base.model)
    assert "Answers will not end; use another base model" in caplog.text
    assert prompter.stop_ids[0] == prompter.end_id
    assert not can_say(base.model, len(head))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["chatml", "chatml-eos", "think"])
def test_the_shared_cases_end_their_answers(tmp_path: Path, model: str) -> None:
    module = runpy.run_path(str(shared("cases") / "make_models.py"))
    tokens, template = ["<|im_start|>", "<|im_end|>"], module["CHATML"]
    if model == "think":
        tokens, template = [*tokens, "<think>", "</think>"], module["THINK"]
    module["variant"](tmp_path / model, template, tokens, "<|im_end|>" if model == "chatml-eos" else None)
    tuned, prompter, shard = _trained(
        tmp_path / model,
        shared("cases") / "rows8.jsonl",
        local_epochs=15,
        learning_rate=1e-2,
        lora_rank=16,
        lora_dropout=0.0,
    )
    with shard:
        assert evaluate(tuned, shard, prompter, max_new_tokens=40, batch_size=8).means["rouge_l"] > 0.99
