"""DP-SGD: gradients against plain autograd, the noise, the sampling, what it refuses, and an attack on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedhds.errors import TaskError
from fedhds.privacy.accountant import Cost, epsilon_of
from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.peft_methods.base import adapter_state
from fedhds_client.training import dp_sgd
from fedhds_client.training.dp_sgd import PrivateGradient, poisson_batches, train_private
from fedhds_client.training.loop import TrainOutcome
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.tiny import make_model, write_rows

NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def spec_of(**fields: Any) -> RunSpec:
    base = {"model": "m", "rounds": 1, "selection_strategy": "full", "dp_noise_multiplier": 1.0, "lora_dropout": 0.0}
    return RunSpec.of(**base | {"learning_rate": 1e-2, "batch_size": 2, "lora_rank": 2} | fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


def written(name: str, llama: Path, folder: Path) -> Path:
    if name == "llama":
        return llama
    torch.manual_seed(0)
    model: Any
    if name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=2, **NO_DROPOUT)
        )
    elif name == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, max_position_embeddings=256))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**SIZES, max_position_embeddings=256, sliding_window=16))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def adapter_on(folder: Path, spec: RunSpec) -> AdapterModel:
    torch.manual_seed(0)
    adapter = AdapterModel(load_base_model(str(folder), device="cpu"), spec)
    # B starts at zero, and A would have no gradient.
    for parameter in adapter.parameters():
        parameter.data = torch.randn_like(parameter) / 8
    return adapter


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    with Shard.open(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", {"cats": 5, "dogs": 5})) as opened:
        yield opened


def encoded(adapter: AdapterModel, shard: Shard, count: int) -> list[Encoded]:
    prompter = Prompter(adapter.tokenizer, max_length=min(256, adapter.base.max_length))
    return [prompter.encode(shard[row]) for row in range(count)]


def gradient_of(
    adapter: AdapterModel, *, noise: float = 0.0, norm: float = 1.0, expected: float = 1.0
) -> PrivateGradient:
    adapter.module.train()
    return PrivateGradient(
        adapter,
        ResponseLoss(adapter),
        adapter.parameters(),
        max_grad_norm=norm,
        noise_multiplier=noise,
        expected_batch_size=expected,
        source=torch.Generator().manual_seed(3),
    )


def clipped_by_hand(adapter: AdapterModel, rows: list[Encoded], norm: float) -> list[torch.Tensor]:
    """The sum over rows of the clipped gradients of each row's mean loss, row by row with plain autograd."""
    loss_of = ResponseLoss(adapter)
    sums = [torch.zeros_like(parameter) for parameter in adapter.parameters()]
    for row in rows:
        total, count = loss_of([row])
        gradients = torch.autograd.grad(total / count, adapter.parameters())
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        for summed, gradient in zip(sums, gradients, strict=True):
            summed += gradient * min(1.0, norm / (length + 1e-6))
    return sums


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen", "gemma"])
def test_gradients_are_clipped_rows_plus_the_drawn_noise(name: str, llama: Path, shard: Shard, tmp_path: Path) -> None:
    adapter = adapter_on(written(name, llama, tmp_path), spec_of())
    rows = encoded(adapter, shard, 6)
    assert len({len(row.input_ids) for row in rows}) > 1
    lengths = []
    for row in rows:
        sums = clipped_by_hand(adapter, [row], 1e9)
        lengths.append(math.sqrt(sum(float(each.square().sum()) for each in sums)))
    # Some rows are clipped, others are not.
    norm = float(np.median(lengths))
    expected = clipped_by_hand(adapter, rows, norm)
    gradient = gradient_of(adapter, noise=0.5, norm=norm, expected=4.0)
    assert gradient(rows) == (0.0, 0)
    made = [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]
    source = torch.Generator().manual_seed(3)
    assert len(made) == len(expected) > 0
    for have, summed in zip(made, expected, strict=True):
        noise = torch.normal(0.0, 0.5 * norm, summed.shape, generator=source)
        torch.testing.assert_close(have, (summed + noise) / 4, rtol=2e-4, atol=2e-5)
    gradient.close()


def test_no_row_moves_the_sum_by_more_than_the_clipping_norm(llama: Path, shard: Shard) -> None:
    adapter = adapter_on(llama, spec_of())
    rows = encoded(adapter, shard, 5)
    gradient = gradient_of(adapter, norm=0.01)

    def summed(batch: list[Encoded]) -> torch.Tensor:
        gradient(batch)
        found = [parameter.grad for parameter in adapter.parameters()]
        whole = torch.cat([each.flatten() for each in found if each is not None]).clone()
        for parameter in adapter.parameters():
            parameter.grad = None
        return whole

    everything = summed(rows)
    for left_out in range(5):
        moved = everything - summed([row for index, row in enumerate(rows) if index != left_out])
        assert 0.009 < float(moved.norm()) <= 0.01 * (1 + 1e-4)
    gradient.close()


def test_an_empty_batch_is_noise_alone_with_the_stated_variance(llama: Path) -> None:
    """The variance of d normal values is chi-squared; a false alarm comes once in a million runs."""
    adapter = adapter_on(llama, spec_of())
    gradient = gradient_of(adapter, noise=2.0, norm=0.5, expected=4.0)
    values = []
    for _ in range(5):
        assert gradient([]) == (0.0, 0)
        values += [parameter.grad.flatten() for parameter in adapter.parameters() if parameter.grad is not None]
    gradient.close()
    drawn = torch.cat(values).double() / (2.0 * 0.5 / 4.0)
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(drawn))
    assert low < float(drawn.square().sum()) < high
    assert abs(float(drawn.mean())) < 5 / math.sqrt(len(drawn))


def test_parts_give_the_same_sum_and_memory_that_runs_out_halves_them(
    llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_on(llama, spec_of())
    rows = encoded(adapter, shard, 7)
    expected = clipped_by_hand(adapter, rows, 0.1)
    gradient = gradient_of(adapter, norm=0.1)
    loss_of = gradient._loss_of

    def scarce(batch: Any) -> Any:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return loss_of(batch)

    monkeypatch.setattr(gradient, "_loss_of", scarce)
    gradient(rows)
    for parameter, summed in zip(adapter.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, summed, rtol=2e-4, atol=1e-6)
    gradient.close()


def test_a_gradient_that_is_not_finite_counts_as_zero(
    llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that failed would tell of the row."""
    adapter = adapter_on(llama, spec_of())
    rows = encoded(adapter, shard, 3)
    gradient = gradient_of(adapter, norm=0.1)
    scale = PrivateGradient._scale

    def poisoned(self: PrivateGradient, batch: Any) -> None:
        for place, row in enumerate(batch):
            if row == rows[1]:
                adapter.parameters()[0].grad_sample[place] = math.nan  # type: ignore[attr-defined]
        scale(self, batch)

    monkeypatch.setattr(PrivateGradient, "_scale", poisoned)
    expected = clipped_by_hand(adapter, [rows[0], rows[2]], 0.1)
    gradient(rows)
    for parameter, summed in zip(adapter.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, summed, rtol=2e-4, atol=1e-6)


def test_every_row_is_drawn_by_itself_with_the_stated_rate() -> None:
    """Bounds of a binomial; a false alarm comes once in a million runs."""
    cost = Cost(1.0, 0.1, 400)
    batches = list(poisson_batches(range(20), cost, torch.Generator().manual_seed(1)))
    counts = np.bincount([row for batch in batches for row in batch], minlength=20)
    low, high = stats.binom.ppf([5e-7 / 20, 1 - 5e-7 / 20], 400, 0.1)
    assert ((low <= counts) & (counts <= high)).all()
    assert len(batches) == 400
    assert any(not batch for batch in batches)
    sizes = np.array([len(batch) for batch in batches])
    assert 1 < sizes.var() < 2.6


def trained(
    adapter: AdapterModel, shard: Shard, spec: RunSpec, cost: Cost, rows: Any = range(10), **options: Any
) -> TrainOutcome:
    prompter = Prompter(adapter.tokenizer, max_length=256)
    return train_private(
        adapter,
        shard,
        rows,
        prompter,
        spec,
        cost,
        expected_rows=10,
        seed=1,
        round_number=1,
        progress=lambda share: None,
        cancelled=lambda: False,
        **options,
    )


def weights(adapter: AdapterModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(adapter.module).items()}


@pytest.mark.parametrize("roles", [frozenset(), frozenset({"lora_B"})])
def test_training_moves_what_is_sent_and_leaves_no_hooks(llama: Path, shard: Shard, roles: frozenset[str]) -> None:
    spec = spec_of()
    adapter = adapter_on(llama, spec)
    before = weights(adapter)
    outcome = trained(adapter, shard, spec, Cost(1.0, 0.2, 3), trainable_roles=roles)
    assert (outcome.steps, outcome.loss) == (3, 0.0)
    after = weights(adapter)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not roles or "lora_B" in name}
    assert not any(module._backward_hooks or module._forward_hooks for module in adapter.module.modules())
    # Again, with fresh noise though the seed is the same.
    adapter = adapter_on(llama, spec)
    trained(adapter, shard, spec, Cost(1.0, 0.2, 3), trainable_roles=roles)
    assert all(not torch.equal(after[name], tensor) for name, tensor in weights(adapter).items() if name in moved)


def test_without_any_row_there_are_steps_of_noise(llama: Path, shard: Shard) -> None:
    spec = spec_of()
    adapter = adapter_on(llama, spec)
    before = weights(adapter)
    assert trained(adapter, shard, spec, Cost(1.0, 0.2, 2), rows=()).steps == 2
    assert all(not torch.equal(before[name], tensor) for name, tensor in weights(adapter).items())


def test_weights_that_did_not_move_are_a_failure(llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The known silent failure: hooks on stale parameters, so that the loss falls and the adapter stays."""
    spec = spec_of()
    adapter = adapter_on(llama, spec)
    stale = [torch.nn.Parameter(parameter.clone()) for parameter in adapter.parameters()]
    owned = adapter.parameters
    monkeypatch.setattr(adapter, "parameters", lambda roles=frozenset(): stale if roles else owned())
    with pytest.raises(TaskError, match=r"layers share|other weights"):
        trained(adapter, shard, spec, Cost(1.0, 0.2, 1), trainable_roles=frozenset({"any"}))
    with pytest.raises(TaskError, match="other weights than those that are sent"):
        gradient_of(adapter).check_moved()


@pytest.mark.parametrize(
    ("change", "reason"),
    [("half", "quantized"), ("tied", "several layers share"), ("norm", "linear layers' weights")],
)
def test_weights_that_opacus_cannot_do_are_refused(llama: Path, shard: Shard, change: str, reason: str) -> None:
    adapter = adapter_on(llama, spec_of())
    rows = encoded(adapter, shard, 2)
    linear = [m for m in adapter.module.modules() if type(m) is torch.nn.Linear and m.weight.requires_grad]
    if change == "half":
        linear[0].weight.data = linear[0].weight.data.half()
    elif change == "tied":
        twin = next(m for m in linear[1:] if m.weight.shape == linear[0].weight.shape)
        twin.weight = linear[0].weight
    else:
        next(m for m in adapter.module.modules() if "RMSNorm" in type(m).__name__).weight.requires_grad_(True)
    gradient = gradient_of(adapter)
    with pytest.raises(TaskError, match=reason):
        gradient(rows)
    gradient.close()


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"selection_strategy": "fedhds"}, "selection_strategy"),
        ({"selection_strategy": "federated-kmeans"}, "selection_noise_multiplier"),
        ({"use_dora": True}, "peft_method"),
        ({"peft_method": "ia3"}, "peft_method"),
        ({"peft_method": "prompt-tuning"}, "peft_method"),
        ({"peft_method": "prefix-tuning"}, "peft_method"),
        ({"epsilon": 8.0}, "epsilon"),
    ],
)
def test_combinations_without_a_guarantee_are_refused_with_the_reason(settings: dict[str, Any], setting: str) -> None:
    base = {"model": "m", "rounds": 1, "selection_strategy": "full", "dp_noise_multiplier": 1.0}
    with pytest.raises(ValueError, match=f"{setting}: "):
        RunSpec.of(**base | settings)


@pytest.mark.long
def test_a_membership_attack_stays_below_epsilon_and_is_above_it_without_noise(llama: Path, shard: Shard) -> None:
    """Is row 0 in the shard? The adversary knows all else and looks at the gradient's projection on the row's own.

    That is the strongest attack on one release. Epsilon's lower bound follows from the errors of the best threshold, by
    Clopper-Pearson at 1e-4 on both; a false alarm comes once in some thousands of runs.
    """
    norm, noise, trials = 0.05, 1.0, 2000
    adapter = adapter_on(llama, spec_of())
    rows = encoded(adapter, shard, 4)
    target = torch.cat([each.flatten() for each in clipped_by_hand(adapter, rows[:1], norm)])
    sums = {inside: clipped_by_hand(adapter, rows[0 if inside else 1 :], norm) for inside in (True, False)}

    def lower_bound(noise: float) -> float:
        scores = {}
        for inside, parts in sums.items():
            summed = torch.cat([each.flatten() for each in parts])
            source = torch.Generator().manual_seed(int(inside) + 1)
            draws = torch.randn(trials, generator=source) * noise * norm * float(target.norm())
            scores[inside] = (float(summed @ target) + draws).numpy()
        best = 0.0
        for threshold in np.quantile(scores[False], [0.5, 0.9, 0.95, 0.99, 1.0]):
            hits, alarms = (scores[True] > threshold).sum(), (scores[False] > threshold).sum()
            surely = stats.beta.ppf(1e-4, hits, trials - hits + 1) if hits else 0.0
            rarely = stats.beta.ppf(1 - 1e-4, alarms + 1, trials - alarms)
            best = max(best, math.log(max(surely - 1e-5, 1e-300) / rarely))
        return best

    epsilon = epsilon_of([Cost(noise)], delta=1e-5)
    assert lower_bound(noise) < epsilon
    assert lower_bound(1e-3) > epsilon
    assert lower_bound(noise) > 0.3


def test_the_random_source_is_new_each_time(monkeypatch: pytest.MonkeyPatch, llama: Path, shard: Shard) -> None:
    seeds: list[int] = []

    def none(rows: Any, cost: Cost, source: torch.Generator) -> Iterator[list[int]]:
        seeds.append(source.initial_seed())
        yield []

    monkeypatch.setattr(dp_sgd, "poisson_batches", none)
    spec = spec_of()
    for _ in range(3):
        trained(adapter_on(llama, spec), shard, spec, Cost(1.0, 0.2, 1))
    assert len(set(seeds)) == 3
