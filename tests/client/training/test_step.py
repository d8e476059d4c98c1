"""One optimizer step: the same gradient however it is computed, the schedule of its rate, and what FedProx adds."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn import functional
from transformers import AutoTokenizer

from fedhds.errors import TaskError
from fedhds.spec import RunSpec, TrainingSpec
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel, InferenceModel
from fedhds_client.models.loading import BaseModel, load_base_model
from fedhds_client.training import loop
from fedhds_client.training.batches import parts_of_like_length, shuffled_batches
from fedhds_client.training.head_loss import HeadLoss
from fedhds_client.training.loop import train
from fedhds_client.training.response_loss import ResponseLoss
from fedhds_client.training.schedule import learning_rate
from fedhds_client.training.step_gradient import MeanGradient
from tests.support.architectures import tiny_config, tiny_model
from tests.support.tiny import make_model, write_rows

SPEC = RunSpec.of(model="m", rounds=1, lora_rank=2, lora_dropout=0.0, learning_rate=1e-2, batch_size=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    """Eight rows of several lengths."""
    with Shard.open(write_rows(tmp_path / "rows.jsonl", {"cats": 3, "hippopotamuses": 3, "a": 2})) as opened:
        yield opened


def _adapter(folder: Path, spec: RunSpec = SPEC) -> AdapterModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = AdapterModel(load_base_model(str(folder), device="cpu"), spec)
        for parameter in adapter.parameters():
            # A first B is zero, and gives A no gradient.
            parameter.data += 0.02 * torch.randn_like(parameter)
    return adapter


def _trained(adapter: AdapterModel, shard: Shard, spec: RunSpec = SPEC, **options: Any) -> list[torch.Tensor]:
    prompter = Prompter(adapter.tokenizer, max_length=adapter.base.max_length)
    defaults: dict[str, Any] = {"seed": 1, "progress": lambda share: None, "cancelled": lambda: False}
    train(adapter, shard, range(8), prompter, spec.training, **(defaults | options))
    return [parameter.detach().clone() for parameter in adapter.parameters()]


@pytest.mark.parametrize("pad_token", ["<pad>", pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding_side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "qwen3", "gemma2", "phi"])
def test_a_round_equals_transformers_and_peft(
    architecture: str, padding_side: str, pad_token: str | None, llama: Path, shard: Shard
) -> None:
    """Loss, gradients' effect and adapter after two steps are those of a plain loop over single rows."""
    tokenizer: Any = AutoTokenizer.from_pretrained(llama)
    tokenizer.padding_side, tokenizer.pad_token = padding_side, pad_token or tokenizer.eos_token
    spec = SPEC.replace(learning_rate=1e-4)
    sizes = tiny_config(architecture)
    for name in [name for name in vars(sizes) if "drop" in name and isinstance(getattr(sizes, name), float)]:
        setattr(sizes, name, 0.0)
    model = tiny_model(sizes)
    plain = copy.deepcopy(model)
    adapter = AdapterModel(BaseModel(architecture, model, tokenizer, 256, torch.float32, ()), spec)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    config = copy.deepcopy(adapter.module.peft_config["default"])
    theirs: Any = get_peft_model(plain, config)
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(adapter.module))
    prompter = Prompter(tokenizer, max_length=256)
    options: Any = {"seed": 1, "progress": lambda share: None, "cancelled": lambda: False}
    batches = list(shuffled_batches(range(8), spec.training, torch.Generator().manual_seed(1)))
    adapter.module.train()
    first = _gradients(adapter, [prompter.encode(shard[row]) for row in batches[0]], 4)
    outcome = train(adapter, shard, range(8), prompter, spec.training, **options)
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=spec.training.learning_rate)
    loss = tokens = 0.0
    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for ids in batches:
        rows = [prompter.encode(shard[row]) for row in ids]
        count = sum(sum(row.loss) for row in rows)
        optimizer.zero_grad()
        for row in rows:
            labels = [token if wanted else -100 for token, wanted in zip(row.input_ids, row.loss, strict=True)]
            one = theirs(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss * sum(row.loss)
            torch.autograd.backward(one / count)
            loss += float(one.detach())
        if ids is batches[0]:
            theirs_first = [parameter.grad for parameter in parameters if parameter.grad is not None]
            torch.testing.assert_close(first, theirs_first, rtol=1e-3, atol=1e-5)
        torch.nn.utils.clip_grad_norm_(parameters, spec.training.max_grad_norm)
        optimizer.step()
        tokens += count
    assert outcome.loss == pytest.approx(loss / tokens, rel=1e-4)
    assert outcome.response_tokens == tokens
    # Adam makes whole steps of gradients that are nothing but rounding, so single values may differ.
    ours, end = (torch.cat([one.detach().flatten() for one in each]) for each in (adapter.parameters(), parameters))
    assert float((ours - end).norm() / (end - start).norm()) < 0.15


def _rows(lengths: Sequence[int]) -> list[Encoded]:
    return [
        Encoded(
            [5 + (7 * row + place) % 200 for place in range(length)],
            [place >= 2 for place in range(length)],
            2,
            None,
            False,
        )
        for row, length in enumerate(lengths)
    ]


def _gradients(adapter: AdapterModel, batch: Sequence[Encoded], max_rows: int) -> list[torch.Tensor]:
    gradient_of = MeanGradient(ResponseLoss(adapter), adapter.parameters())
    gradient_of._max_rows = max_rows
    for parameter in adapter.parameters():
        parameter.grad = None
    gradient_of(batch)
    return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]


def test_however_a_batch_is_cut_its_gradient_is_that_of_the_whole(llama: Path) -> None:
    adapter, batch = _adapter(llama), _rows((30, 4, 17, 9, 5))
    total, count = ResponseLoss(adapter)(batch)
    torch.autograd.backward(total / count)
    whole = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    for max_rows in (1, 2, 5):
        torch.testing.assert_close(_gradients(adapter, batch, max_rows), whole, rtol=1e-4, atol=1e-6)


def test_parts_shrink_when_memory_runs_out(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, batch, sizes = _adapter(llama), _rows((8, 8, 8, 8)), list[int]()
    whole = _gradients(adapter, batch, 4)
    honest = ResponseLoss.__call__

    def limited(self: ResponseLoss, rows: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 1 bytes")
        return honest(self, rows)

    monkeypatch.setattr(ResponseLoss, "__call__", limited)
    with caplog.at_level(logging.WARNING):
        halved = _gradients(adapter, batch, 4)
    torch.testing.assert_close(halved, whole, rtol=1e-4, atol=1e-6)
    assert sizes == [4, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "the device ran out of memory; it computes at most 2 rows at a time from now on, with the same steps"
    ]
    monkeypatch.setattr(ResponseLoss, "__call__", lambda self, rows: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        _gradients(adapter, batch, 4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 40))
def test_parts_hold_every_row_once_and_pad_little(lengths: list[int], max_rows: int, overhead: int) -> None:
    parts = parts_of_like_length(lengths, max_rows=max_rows, overhead=overhead)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert max(map(len, parts)) <= max_rows

    def cost(cut: Sequence[Sequence[int]]) -> int:
        return sum(overhead + len(part) * max(lengths[index] for index in part) for part in cut)

    in_order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    assert cost(parts) <= cost([in_order[at : at + max_rows] for at in range(0, len(lengths), max_rows)])
    assert cost(parts) <= cost([[index] for index in in_order])


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_behind_the_head_is_that_of_all_logits(cap: float | None, trained: bool) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50)
    head.weight.data *= 10
    head.requires_grad_(trained)
    text = SimpleNamespace(logit_scale=0.5, logits_scaling=None, final_logit_softcapping=cap)
    loss_of = HeadLoss(head, SimpleNamespace(get_text_config=lambda: text))
    hidden, targets = torch.randn(300, 16, requires_grad=True), torch.randint(0, 50, (300,))
    logits = head(hidden) * 0.5
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    wanted = [hidden, *(head.parameters() if trained else ())]
    gradients = torch.autograd.grad(3 * expected, wanted)
    total = loss_of(hidden, targets)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(torch.autograd.grad(3 * total, wanted), gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "way"),
    [("llama", "fused"), ("gemma2", "fused"), ("granite", "fused"), ("cohere", "fused"), ("minicpm3", "selected")],
)
def test_the_quickest_way_that_gives_the_models_logits(architecture: str, way: str, llama: Path) -> None:
    model = tiny_model(tiny_config(architecture))
    base = BaseModel(architecture, model, AutoTokenizer.from_pretrained(llama), 256, torch.float32, ())
    loss_of = ResponseLoss(InferenceModel(base, model))
    loss_of(_rows((6, 4)))
    assert loss_of._way == way


def test_activations_that_are_computed_again_change_nothing(llama: Path, shard: Shard) -> None:
    plain = _trained(_adapter(llama), shard)
    again = _adapter(llama)
    assert all(map(torch.equal, _trained(again, shard, gradient_checkpointing=True), plain))
    assert not again.base.model.is_activation_checkpointing
    again.base.model.supports_gradient_checkpointing = False
    with pytest.raises(TaskError, match="start this site without --gradient-checkpointing"):
        _trained(again, shard, gradient_checkpointing=True)


def test_fedprox_follows_its_formula(llama: Path, shard: Shard) -> None:
    parameters = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    start, gradients = [torch.randn(3) for _ in parameters], [torch.randn(3), None]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    loop._pull_back(parameters, start, 0.7)
    far = torch.stack([((one - first) ** 2).sum() for one, first in zip(parameters, start, strict=True)]).sum()
    for parameter, gradient, pull in zip(
        parameters, gradients, torch.autograd.grad(0.7 / 2 * far, parameters), strict=True
    ):
        torch.testing.assert_close(parameter.grad, pull if gradient is None else gradient + pull)
    first = [parameter.detach() for parameter in _adapter(llama).parameters()]
    spec = SPEC.replace(local_epochs=4)
    plain, pulled = (_trained(_adapter(llama), shard, spec.replace(proximal_mu=mu)) for mu in (0.0, 10.0))
    free, near = (sum(float((a - b).norm()) for a, b in zip(end, first, strict=True)) for end in (plain, pulled))
    assert near < free / 2


def test_weight_decay_is_adamws(llama: Path, shard: Shard) -> None:
    plain, decayed = (
        _trained(_adapter(llama), shard, SPEC.replace(local_steps=1, weight_decay=decay)) for decay in (0.0, 0.5)
    )
    start = list(_adapter(llama).parameters())
    for one, other, first in zip(plain, decayed, start, strict=True):
        torch.testing.assert_close(other, one - 1e-2 * 0.5 * first.detach(), rtol=1e-4, atol=1e-7)


def test_schedules_span_the_run() -> None:
    def rates(**fields: Any) -> list[float]:
        spec = TrainingSpec(learning_rate=1.0, **fields)
        return [
            learning_rate(spec, round_number=number, rounds=2, step=step, steps=4)
            for number in (1, 2)
            for step in range(4)
        ]

    assert rates() == [1.0] * 8
    assert rates(lr_schedule="linear") == pytest.approx([1 - step / 8 for step in range(8)])
    cosine = [torch.cos(torch.tensor(torch.pi * step / 8)).item() / 2 + 0.5 for step in range(8)]
    assert rates(lr_schedule="cosine") == pytest.approx(cosine)
    assert rates(lr_warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(lr_warmup=0.5, lr_schedule="linear") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])


def test_so_many_steps_whatever_the_rows(llama: Path, shard: Shard) -> None:
    adapter = _adapter(llama)
    prompter = Prompter(adapter.tokenizer, max_length=256)
    options: Any = {"seed": 1, "progress": lambda share: None, "cancelled": lambda: False}
    for rows, steps, behind in ((2, 3, 2), (8, 1, 4), (8, 4, 8)):
        spec = SPEC.replace(local_steps=steps, local_epochs=7).training
        outcome = train(adapter, shard, range(rows), prompter, spec, **options)
        assert (outcome.steps, outcome.samples, outcome.loss_rows) == (steps, rows, behind)
        assert outcome.tokens_per_s > 0
    passes = list(shuffled_batches(range(8), SPEC.replace(local_steps=5).training, torch.Generator().manual_seed(0)))
    assert sorted(passes[0] + passes[1]) == sorted(passes[2] + passes[3]) == list(range(8))
    assert passes[:2] != passes[2:4]
