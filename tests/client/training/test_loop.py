"""Local training: what the loss counts, what a seed fixes, and how it stops."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from fedhds.errors import TaskError
from fedhds.spec import RunSpec
from fedhds_client.computation import Cancelled
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.training.loop import TrainOutcome, train
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.shared import shared
from tests.support.tiny import make_model, write_rows


def _spec(**fields: Any) -> RunSpec:
    return RunSpec.of(**{"model": "m", "rounds": 1, "learning_rate": 1e-2, "batch_size": 2} | fields)


def _adapter(folder: Path, spec: RunSpec) -> AdapterModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AdapterModel(load_base_model(str(folder), device="cpu"), spec)


def _prompter(adapter: AdapterModel, max_length: int = 256) -> Prompter:
    return Prompter(adapter.tokenizer, max_length=min(max_length, adapter.base.max_length))


def _train(adapter: AdapterModel, shard: Shard, rows: Sequence[int], spec: RunSpec, **options: Any) -> TrainOutcome:
    prompter = options.pop("prompter", None) or _prompter(adapter)
    defaults: dict[str, Any] = {"seed": 1, "progress": lambda share: None, "cancelled": lambda: False}
    options = defaults | options
    return train(adapter, shard, rows, prompter, spec.training, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "gpt2", "granite"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """Tiny models: rotary positions, learnt positions, and logits that are scaled behind the head."""
    if request.param == "llama":
        return llama
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model: Any
    if request.param == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=256, n_embd=32, n_layer=2, n_head=2))
    else:
        config = GraniteConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            logits_scaling=8.0,
        )
        model = GraniteForCausalLM(config)
        # Random logits are so close to 0 that dividing them by 8 would hardly show.
        model.get_output_embeddings().weight.data *= 50
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[Shard]:
    """Eight short rows."""
    with Shard.open(write_rows(tmp_path / "rows.jsonl", {"cats": 4, "dogs": 4})) as opened:
        yield opened


def _plain_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Row by row and through all logits, as transformers computes it from labels."""
    total = 0.0
    for row in rows:
        labels = [-100] * row.answer_start + row.input_ids[row.answer_start :]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * (len(row.input_ids) - row.answer_start)
    return total


def test_the_loss_of_a_padded_batch_is_that_of_labels_row_by_row(any_model: Path, shard: Shard) -> None:
    adapter = _adapter(any_model, _spec())
    rows = [_prompter(adapter).encode(shard[row]) for row in range(5)]
    assert len({len(row.input_ids) for row in rows}) > 1
    with torch.no_grad():
        total, tokens = ResponseLoss(adapter)(rows)
    assert tokens == sum(len(row.input_ids) - row.answer_start for row in rows)
    assert float(total) == pytest.approx(_plain_loss(adapter.module, rows), rel=1e-5)


def test_prompt_tokens_give_no_loss_of_their_own(llama: Path, shard: Shard) -> None:
    adapter = _adapter(llama, _spec())
    row = _prompter(adapter).encode(shard[0])
    embedding = adapter.base.model.get_input_embeddings().weight
    # Were prompt tokens targets too, the head's rows of tokens that only prompts hold would get a pull upwards: a
    # loss over responses alone can only push them down.
    prompt_only = sorted(set(row.input_ids[: row.answer_start]) - set(row.input_ids[row.answer_start :]))
    tokens, hidden = embedding.shape
    head = torch.nn.Linear(hidden, tokens, bias=False)
    head.weight.data.copy_(embedding.data)
    adapter.base.model.set_output_embeddings(head)
    torch.autograd.backward(ResponseLoss(adapter)([row])[0])
    assert head.weight.grad is not None
    states = adapter.base.model.model(input_ids=torch.tensor([row.input_ids])).last_hidden_state[0]
    before = states[row.answer_start - 1 : -1].detach()
    probabilities = torch.softmax(head(before), dim=-1)[:, prompt_only]
    assert torch.allclose(head.weight.grad[prompt_only], probabilities.T @ before, atol=1e-5)


def test_training_lowers_the_loss_and_reports_it(llama: Path, shard: Shard) -> None:
    spec = _spec(local_epochs=4)
    adapter = _adapter(llama, spec)
    rows = [_prompter(adapter).encode(shard[row]) for row in range(8)]
    before = _plain_loss(adapter.module, rows)
    shares: list[float] = []
    first = _train(adapter, shard, range(8), spec, progress=shares.append)
    after = _plain_loss(adapter.module, rows)
    # Its head is frozen at small random weights, so there is not much to win.
    assert after < 0.97 * before
    tokens = sum(len(row.input_ids) - row.answer_start for row in rows)
    # The mean of the last epoch, in which the model changes and dropout acts.
    assert after / tokens - 0.3 < first.loss < before / tokens
    assert (first.samples, first.steps, first.truncated_rows) == (8, 16, 0)
    assert shares == [pytest.approx((step + 1) / 16) for step in range(16)]
    assert first.seconds > 0


def test_the_loss_is_weighted_by_tokens_not_by_batches(llama: Path, shard: Shard) -> None:
    spec = _spec(learning_rate=1e-12, lora_dropout=0.0, batch_size=3)
    adapter = _adapter(llama, spec)
    rows = [_prompter(adapter).encode(shard[row]) for row in range(7)]
    tokens = sum(len(row.input_ids) - row.answer_start for row in rows)
    outcome = _train(adapter, shard, range(7), spec)
    assert outcome.steps == 3
    assert outcome.loss == pytest.approx(_plain_loss(adapter.module, rows) / tokens, rel=1e-4)


def _bytes_after(folder: Path, shard: Shard, path: Path, **options: Any) -> bytes:
    spec = _spec()
    adapter = _adapter(folder, spec)
    torch.manual_seed(options.pop("noise", 0))
    _train(adapter, shard, range(8), spec, **options)
    adapter.save(path)
    return path.read_bytes()


def test_a_seed_fixes_every_byte(tmp_path: Path, llama: Path, shard: Shard) -> None:
    one = _bytes_after(llama, shard, tmp_path / "a", seed=7)
    assert _bytes_after(llama, shard, tmp_path / "b", seed=7, noise=99) == one
    assert _bytes_after(llama, shard, tmp_path / "c", seed=8) != one
    assert _bytes_after(llama, shard, tmp_path / "d", seed=7 + 2**64) == one


def test_dropout_acts_in_training(llama: Path, shard: Shard) -> None:
    losses = set()
    for dropout in (0.0, 0.5):
        spec = _spec(lora_dropout=dropout, batch_size=8, local_epochs=3)
        losses.add(_train(_adapter(llama, spec), shard, range(8), spec).loss)
    assert len(losses) == 2


def test_base_weights_global_random_state_and_mode_are_left_alone(llama: Path, shard: Shard) -> None:
    spec = _spec()
    adapter = _adapter(llama, spec)
    frozen = {name: tensor.clone() for name, tensor in adapter.module.state_dict().items() if "lora_" not in name}
    changing = [parameter.clone() for parameter in adapter.parameters()]
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    # Two steps: in the first, B = 0 leaves A without a gradient.
    _train(adapter, shard, [3, 1, 0, 2], spec)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not adapter.module.training
    assert all(parameter.grad is None for parameter in adapter.module.parameters())
    assert all(torch.equal(adapter.module.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert not any(torch.equal(a, b) for a, b in zip(changing, adapter.parameters(), strict=True))


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_of_some_roles_only_their_tensors_change(tmp_path: Path, llama: Path, shard: Shard, role: str) -> None:
    spec = _spec(local_epochs=2)
    adapter = _adapter(llama, spec)
    # In a first adapter B is zero, and A has no gradient.
    _train(adapter, shard, range(8), spec)
    adapter.save(tmp_path / "start")
    state = {tensor.name: adapter.values()(tensor).tobytes() for tensor in adapter.manifest().tensors}
    _train(adapter, shard, range(8), spec, seed=2, trainable_roles=frozenset({role}))
    for tensor in adapter.manifest().tensors:
        assert (adapter.values()(tensor).tobytes() == state[tensor.name]) is (tensor.role != role), tensor.name
    # Nothing stays frozen, and nothing is left of gradients.
    assert len(adapter.parameters()) == len(adapter.manifest().tensors)
    assert all(parameter.grad is None for parameter in adapter.module.parameters())
    # All roles is the same as none.
    results = []
    for roles in (frozenset[str](), adapter.manifest().roles):
        adapter.load(tmp_path / "start")
        _train(adapter, shard, range(8), spec, trainable_roles=roles)
        results.append(adapter.save(tmp_path / "end"))
    assert results[0] == results[1]


@pytest.mark.parametrize("frozen_on", ["cancelled", "role"])
def test_nothing_stays_frozen_when_training_ends_early(llama: Path, shard: Shard, frozen_on: str) -> None:
    adapter = _adapter(llama, _spec())
    if frozen_on == "cancelled":
        with pytest.raises(Cancelled):
            _train(adapter, shard, [0], _spec(), trainable_roles=frozenset({"lora_B"}), cancelled=lambda: True)
    else:
        with pytest.raises(TaskError, match="cannot train magnitude alone; use another --aggregator"):
            _train(adapter, shard, [0], _spec(), trainable_roles=frozenset({"magnitude"}))
    assert len(adapter.parameters()) == len(adapter.manifest().tensors)


def test_rows_become_tokens_batch_by_batch(llama: Path, shard: Shard) -> None:
    spec = _spec(local_epochs=2)
    adapter = _adapter(llama, spec)
    inner, seen = _prompter(adapter), list[int]()

    class Counting:
        def encode(self, row: Any) -> Encoded:
            seen.append(row.id)
            return inner.encode(row)

    at_steps: list[int] = []
    _train(adapter, shard, [0, 2, 4], spec, prompter=Counting(), progress=lambda share: at_steps.append(len(seen)))
    assert at_steps == [2, 3, 5, 6]
    assert sorted(seen[:3]) == sorted(seen[3:]) == [0, 2, 4]


def test_cut_rows_are_counted_once(llama: Path, shard: Shard) -> None:
    spec = _spec(local_epochs=3)
    adapter = _adapter(llama, spec)
    assert _train(adapter, shard, [0, 1, 5], spec, prompter=_prompter(adapter, 64)).truncated_rows == 3


def test_no_rows_is_the_callers_mistake(llama: Path, shard: Shard) -> None:
    with pytest.raises(ValueError, match="no rows"):
        _train(_adapter(llama, _spec()), shard, [], _spec())


def test_it_stops_between_steps_when_asked(llama: Path, shard: Shard) -> None:
    spec, shares = _spec(), list[float]()
    adapter = _adapter(llama, spec)
    with pytest.raises(Cancelled):
        _train(adapter, shard, range(8), spec, progress=shares.append, cancelled=lambda: len(shares) == 2)
    assert shares == [0.25, 0.5]
    assert not adapter.module.training


def test_a_loss_that_is_not_finite_stops_it(llama: Path, shard: Shard) -> None:
    spec = _spec()
    adapter = _adapter(llama, spec)
    with torch.no_grad():
        adapter.base.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(TaskError, match=r"loss is not finite.*--learning-rate"):
        _train(adapter, shard, range(8), spec)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(llama: Path, shard: Shard, max_grad_norm: float) -> None:
    spec = _spec(max_grad_norm=max_grad_norm)
    adapter = _adapter(llama, spec)
    parameter: Any = adapter.parameters()[0]
    parameter.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TaskError, match="gradient is not finite"):
        _train(adapter, shard, range(8), spec)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.parameters())


def test_memory_that_runs_out_says_what_to_lower(llama: Path, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ResponseLoss, "__call__", exhaust)
    with pytest.raises(TaskError, match=r"with a single row; the operator can lower --max-length"):
        _train(_adapter(llama, _spec()), shard, range(8), _spec())


@pytest.mark.slow
def test_a_pretrained_model_learns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"Name number {n}.", "response": "It is a fig."}) + "\n" for n in range(8))
    )
    spec = _spec(learning_rate=3e-3, local_epochs=2, batch_size=1)
    adapter = _adapter(shared("models/nano-llama"), spec)
    with Shard.open(path) as shard:
        first = _train(adapter, shard, range(8), spec)
        second = _train(adapter, shard, range(8), spec)
    assert second.loss < first.loss
