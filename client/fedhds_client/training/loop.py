"""The local training loop: the adapter on the response tokens of a coreset."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fedhds.errors import TaskError
from fedhds.spec import TrainingSpec
from fedhds_client.computation import Cancelled
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.training.batches import BatchPlan, shuffled_batches, steps_of, steps_of_pass
from fedhds_client.training.response_loss import ResponseLoss
from fedhds_client.training.schedule import learning_rate
from fedhds_client.training.step_gradient import MeanGradient, StepGradient


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """What training did.

    `loss`: mean over the response tokens of the last pass over the rows, in nats, without the proximal term.
    `loss_rows`: distinct rows behind it. `response_tokens`: those of one pass; where there was none, as many as the
    rows that were trained on promise. `tokens`: all that were computed, prompts with them and padding without.
    """

    samples: int
    loss: float
    seconds: float
    truncated_rows: int
    steps: int
    loss_rows: int
    response_tokens: int
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens of prompts and responses a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: AdapterModel,
    shard: Shard,
    rows: Sequence[int],
    prompter: Prompter,
    spec: TrainingSpec,
    *,
    seed: int,
    round_number: int = 1,
    rounds: int = 1,
    trainable_roles: frozenset[str] = frozenset(),
    gradient_checkpointing: bool = False,
    step_gradient: Callable[[ResponseLoss, Sequence[torch.nn.Parameter]], StepGradient] = MeanGradient,
    plan: BatchPlan | None = None,
    progress: Callable[[float], None],
    cancelled: Callable[[], bool],
) -> TrainOutcome:
    """Trains the adapter in place on the rows with ids `rows` (at least one, but for a `plan`).

    Adam, a fresh one in every round, as the global adapter is a new start; order of rows and dropout come from `seed`.
    Rows become tokens batch by batch, so memory does not grow with the shard. The global random state is left alone.
    With `trainable_roles`, tensors of other roles keep their bytes and take no memory for gradients.
    Raises Cancelled, TaskError when loss or gradient is not finite or memory runs out, ValueError without rows.
    """
    if not rows and plan is None:
        raise ValueError("there are no rows to train on")
    started = time.monotonic()
    parameters = model.parameters(trainable_roles)
    optimizer = _optimizer(parameters, spec)
    gradient_of = step_gradient(ResponseLoss(model), parameters)
    start = [parameter.detach().clone() for parameter in parameters] if spec.proximal_mu else []
    order = torch.Generator().manual_seed(seed % 2**63)
    if plan is None:
        pass_steps = steps_of_pass(spec, len(rows))
        plan = BatchPlan(steps_of(spec, len(rows)), pass_steps, shuffled_batches(rows, spec, order))
    steps = plan.steps
    truncated: set[int] = set()
    # Of the newest pass; of the first one, for the weight.
    recent: deque[tuple[float, int, list[int]]] = deque(maxlen=plan.pass_steps)
    first_rows = first_tokens = tokens = 0
    with _training(model, parameters, optimizer, seed), _checkpointing(model, on=gradient_checkpointing):
        for step, ids in enumerate(plan.batches):
            if cancelled():
                raise Cancelled("training was stopped")
            batch = [prompter.encode(shard[row]) for row in ids]
            truncated.update(row for row, encoded in zip(ids, batch, strict=True) if encoded.truncated)
            total, count = gradient_of(batch)
            if not math.isfinite(total):
                raise TaskError("the training loss is not finite; the operator can lower --learning-rate")
            if any(parameter.grad is not None for parameter in parameters):
                _pull_back(parameters, start, spec.proximal_mu)
                rate = learning_rate(spec, round_number=round_number, rounds=rounds, step=step, steps=steps)
                _step(optimizer, parameters, rate, spec.max_grad_norm)
            recent.append((total, count, ids))
            tokens += sum(len(encoded.input_ids) for encoded in batch)
            if step < plan.pass_steps:
                first_rows, first_tokens = first_rows + len(ids), first_tokens + count
            progress((step + 1) / steps)
    return TrainOutcome(
        samples=len(rows),
        loss=sum(total for total, _, _ in recent) / max(sum(count for _, count, _ in recent), 1),
        seconds=time.monotonic() - started,
        truncated_rows=len(truncated),
        steps=steps,
        loss_rows=len({row for _, _, ids in recent for row in ids}),
        response_tokens=round(first_tokens * len(rows) / first_rows) if first_rows else 0,
        tokens=tokens,
    )


def _optimizer(parameters: list[torch.nn.Parameter], spec: TrainingSpec) -> torch.optim.Optimizer:
    if spec.weight_decay:
        return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.Adam(parameters, lr=spec.learning_rate)


@contextmanager
def _training(
    model: AdapterModel, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int
) -> Iterator[None]:
    """Only `parameters` take gradients, dropout acts and comes from `seed`; behind it all is as before."""
    trained = set(parameters)
    frozen = [parameter for parameter in model.parameters() if parameter not in trained]
    devices = [model.device] if model.device.type == "cuda" else []
    model.module.train()
    optimizer.zero_grad(set_to_none=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed % 2**63)
            yield
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in training; the operator can lower --max-length") from error
    finally:
        model.module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def _checkpointing(model: AdapterModel, *, on: bool) -> Iterator[None]:
    """Layers compute their activations again in the backward pass; raises TaskError for a model that cannot."""
    module = model.base.model
    if on and model.has_prefix:
        raise TaskError(
            "the keys and values of prefix tuning are lost where activations are computed again; start this site "
            "without --gradient-checkpointing"
        )
    if on and not module.supports_gradient_checkpointing:
        raise TaskError(
            f"the model type {module.config.model_type} cannot compute activations again; start this site without "
            "--gradient-checkpointing"
        )
    if on:
        module.activation_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if on:
            module.activation_checkpointing_disable()


def _pull_back(parameters: Sequence[torch.nn.Parameter], start: Sequence[torch.Tensor], mu: float) -> None:
    """Adds the gradient of mu/2 ||w - w_global||^2 (Li et al. 2020, FedProx); `start` is empty without it."""
    for parameter, first in zip(parameters, start, strict=False):
        pull = parameter.detach() - first
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(pull, alpha=mu)


def _step(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], rate: float, max_grad_norm: float
) -> None:
    """Clips the gradients, makes one step with the learning rate `rate` and drops them."""
    # A finite loss can have a gradient that is not, and no later loss would tell of the last step's.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if not math.isfinite(float(norm)):
        raise TaskError("the training gradient is not finite; the operator can lower --learning-rate")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
