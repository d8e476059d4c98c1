"""Evaluation: sums and answers that depend on neither padding nor order nor sampling settings."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from fedhds.errors import TaskError
from fedhds.spec import RunSpec
from fedhds.tensors.safetensors import write_adapter
from fedhds_client.computation import Cancelled
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation import generation
from fedhds_client.evaluation.evaluate import evaluate
from fedhds_client.evaluation.generation import Answer, generate
from fedhds_client.models.adapter import AdapterModel, InferenceModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.training.loop import train
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.shared import shared
from tests.support.tiny import make_model, write_rows

SPEC = RunSpec.of(model="m", rounds=1, lora_rank=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "gpt2", pytest.param("gpt_neox", marks=pytest.mark.slow)])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Tiny models with rotary and with learnt positions."""
    if request.param == "llama":
        return llama
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model: Any
    if request.param == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=300, n_embd=32, n_layer=2, n_head=2))
    else:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=300,
            )
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    """Seven rows of three lengths."""
    with Shard.open(write_rows(tmp_path / "rows.jsonl", {"cats": 4, "hippopotamuses": 3})) as opened:
        yield opened


def _opened(folder: Path, max_length: int = 256) -> tuple[InferenceModel, Prompter]:
    base = load_base_model(str(folder), device="cpu")
    return InferenceModel(base, base.model), Prompter(base.tokenizer, max_length=min(max_length, base.max_length))


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_padding_and_order_change_nothing(any_model: Path, shard: Shard, tmp_path: Path, side: str) -> None:
    model, prompter = _opened(any_model)
    model.tokenizer.padding_side = side
    options: dict[str, Any] = {"max_new_tokens": 8}
    alone = evaluate(model, shard, prompter, batch_size=1, **options)
    assert (alone.rows, model.tokenizer.padding_side) == (7, side)
    encoded = [prompter.encode(row) for row in shard]
    tokens = sum(len(row.input_ids) - row.answer_start for row in encoded)
    weights = {name: weight for name, (_, weight) in alone.metrics.items()}
    assert weights == {"loss": tokens, "rouge_l": 7, "rouge_l_unique": 7, "answer_tokens": 7}
    for size in (3, 16):
        together = evaluate(model, shard, prompter, batch_size=size, **options)
        assert together.rows == 7
        assert {name: weight for name, (_, weight) in together.metrics.items()} == weights
        assert together.means == pytest.approx(alone.means, rel=1e-5)
    rows = list(shard)
    assert generate(model, prompter, rows, 8) == [generate(model, prompter, [row], 8)[0] for row in rows]
    lines = shard.path.read_text().splitlines(keepends=True)
    (tmp_path / "backwards.jsonl").write_text("".join(reversed(lines)))
    with Shard.open(tmp_path / "backwards.jsonl") as backwards:
        turned = evaluate(model, backwards, prompter, batch_size=3, **options)
    assert turned.means["loss"] == pytest.approx(alone.means["loss"], rel=1e-5)


def test_a_batch_that_shrinks_gives_the_answers_of_each_alone(
    any_model: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompter = _opened(any_model)
    for weights in model.module.parameters():
        # Far from its start, a random model says different things to different prompts.
        weights.data *= 6 if weights.dim() == 2 else 1
    rows, room = list(shard), 40
    prompts = [prompter.encode_prompt(row, reserve=room).input_ids for row in rows]
    eos = model.tokenizer.eos_token_id
    whole = [generation._continued(model, [prompt], room, set())[0] for prompt in prompts]
    # What this model says anyway ends some answers in the first part of their generation, and others later.
    first = {
        token: [min([*ids, end].index(end) for end in (token, eos)) for ids in whole] for ids in whole for token in ids
    }
    end, lengths = next((end, at) for end, at in sorted(first.items()) if min(at) < 15 and max(at) > 17)
    prompter.stop_ids = (end,)
    assert model.left_padding
    sizes: list[int] = []
    forward = type(model.base.model).forward

    @functools.wraps(forward)
    def counted(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.base.model), "forward", counted)
    together = generate(model, prompter, rows, room)
    assert [answer.tokens for answer in together] == lengths
    assert (sizes[0], len(sizes), sizes) == (7, min(max(lengths) + 1, room), sorted(sizes, reverse=True))
    assert sizes[-1] < 7
    assert together == [generate(model, prompter, [row], room)[0] for row in rows]


def test_validation_reads_and_does_not_write(llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompter = _opened(llama)
    whole = evaluate(model, shard, prompter, max_new_tokens=2, batch_size=4)
    monkeypatch.setattr("fedhds_client.evaluation.evaluate.generate", None)
    read = evaluate(model, shard, prompter, max_new_tokens=0, batch_size=4)
    assert read.means == {"loss": whole.means["loss"]}


def test_some_rows_are_measured_and_their_sums_add_up(llama: Path, shard: Shard) -> None:
    model, prompter = _opened(llama)
    options: dict[str, Any] = {"max_new_tokens": 4, "batch_size": 3}
    parts = [evaluate(model, shard, prompter, rows=rows, **options) for rows in ([0, 2, 4, 6], [1, 3, 5])]
    assert [part.rows for part in parts] == [4, 3]
    assert (parts[0] + parts[1]).means == pytest.approx(evaluate(model, shard, prompter, **options).means, rel=1e-5)


def test_answers_are_greedy(llama: Path, shard: Shard) -> None:
    model, prompter = _opened(llama)
    ids = prompter.encode_prompt(shard[0], reserve=6).input_ids
    length = len(ids)
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(model.module(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    assert model.tokenizer.eos_token_id not in ids[length:]
    expected = model.tokenizer.decode(ids[length:], skip_special_tokens=True)
    assert generate(model, prompter, [shard[0]], 6) == [Answer(expected, 6)]


def test_the_models_own_sampling_settings_are_ignored_and_kept(tmp_path: Path, llama: Path, shard: Shard) -> None:
    folder = shutil.copytree(llama, tmp_path / "m")
    own = json.loads((folder / "generation_config.json").read_text())
    own |= {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1}
    (folder / "generation_config.json").write_text(json.dumps(own))
    plain, model = _opened(llama), _opened(folder)
    rows = list(shard)
    assert generate(*model, rows, 10) == generate(*plain, rows, 10)
    assert model[0].module.generation_config.repetition_penalty == 9.0


def test_answers_end_at_the_tokenizers_and_at_the_models_stop_tokens(tmp_path: Path, llama: Path, shard: Shard) -> None:
    model, prompter = _opened(llama)
    prompt = prompter.encode_prompt(shard[0], reserve=12).input_ids
    whole = model.module.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    stop = whole[0]
    folder = shutil.copytree(llama, tmp_path / "m")
    own = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [2, stop]}
    (folder / "generation_config.json").write_text(json.dumps(own))
    stopped, prompter = _opened(folder)
    (answer,) = generate(stopped, prompter, [shard[0]], 12)
    assert answer == Answer(model.tokenizer.decode(whole[:1], skip_special_tokens=True), 0)
    assert answer != generate(model, prompter, [shard[0]], 12)[0]


def test_answers_longer_than_the_context_are_cut_to_it(tmp_path: Path, llama: Path, shard: Shard) -> None:
    folder = tmp_path / "short"
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    model, prompter = _opened(folder)
    assert evaluate(model, shard, prompter, max_new_tokens=500, batch_size=4).rows == 7


def test_an_adapter_is_measured_and_a_trained_one_is_better(tmp_path: Path, llama: Path, shard: Shard) -> None:
    plain = evaluate(*_swapped(_opened(llama), shard), max_new_tokens=4, batch_size=4)
    adapter = AdapterModel(load_base_model(str(llama), device="cpu"), SPEC)
    prompter = Prompter(adapter.tokenizer, max_length=256)
    fresh = evaluate(adapter, shard, prompter, max_new_tokens=4, batch_size=4)
    assert fresh.means == pytest.approx(plain.means, rel=1e-6)
    spec = SPEC.replace(learning_rate=1e-2, local_epochs=5).training
    train(adapter, shard, range(7), prompter, spec, seed=0, progress=lambda share: None, cancelled=lambda: False)
    assert evaluate(adapter, shard, prompter, max_new_tokens=4, batch_size=4).means["loss"] < plain.means["loss"]


def _swapped(opened: tuple[InferenceModel, Prompter], shard: Shard) -> tuple[InferenceModel, Shard, Prompter]:
    return opened[0], shard, opened[1]


def test_it_reports_progress_and_stops_between_batches(llama: Path, shard: Shard) -> None:
    shares: list[float] = []
    model, prompter = _opened(llama)
    with pytest.raises(Cancelled):
        evaluate(
            model,
            shard,
            prompter,
            max_new_tokens=2,
            batch_size=3,
            progress=shares.append,
            cancelled=lambda: len(shares) == 2,
        )
    assert shares == [pytest.approx(3 / 7), pytest.approx(6 / 7)]


def test_a_loss_that_is_not_finite_is_not_reported(tmp_path: Path, llama: Path, shard: Shard) -> None:
    adapter = AdapterModel(load_base_model(str(llama), device="cpu"), SPEC)
    write_adapter(tmp_path / "huge", adapter.manifest(), lambda spec: np.full(spec.shape, 3e38, np.float32), "float32")
    adapter.load(tmp_path / "huge")
    with pytest.raises(TaskError, match="not finite"):
        evaluate(adapter, shard, Prompter(adapter.tokenizer, max_length=256), max_new_tokens=2, batch_size=4)


def test_memory_that_runs_out_says_what_to_lower(llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ResponseLoss, "__call__", exhaust)
    model, prompter = _opened(llama)
    with pytest.raises(TaskError, match="--inference-batch-size"):
        evaluate(model, shard, prompter, max_new_tokens=2, batch_size=4)


def test_a_pretrained_model(tmp_path: Path) -> None:
    texts = ["The city of", "In the summer of 1914 the king and his army", "Water is", "She opened the door and then"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "completion": " the end of it."}) + "\n" for text in texts))
    model, prompter = _opened(shared("models/nano-llama"), 512)
    with Shard.open(path) as shard:
        answers = generate(model, prompter, list(shard), 16)
        assert len(set(answers)) == len(texts)
        assert answers == [generate(model, prompter, [row], 16)[0] for row in shard]
        one = evaluate(model, shard, prompter, max_new_tokens=16, batch_size=1)
        many = evaluate(model, shard, prompter, max_new_tokens=16, batch_size=3)
    assert one.means == pytest.approx(many.means, rel=1e-4)
    assert one.means["rouge_l"] > 0
    # Far better than a uniform guess over its 4,096 tokens.
    assert one.means["loss"] < math.log(4096)
