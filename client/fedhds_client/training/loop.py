"""The local training loop: the adapter on the response tokens of a coreset."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedhds.errors import TaskError
from fedhds.spec import TrainingSpec
from fedhds_client.computation import Cancelled
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.training.response_loss import ResponseLoss


@dataclass(frozen=True, slots=True)
class TrainOutcome:
    """`loss`: mean over the response tokens of the last epoch, in nats."""

    samples: int
    loss: float
    seconds: float
    truncated_rows: int
    steps: int


def train(
    model: AdapterModel,
    shard: Shard,
    rows: Sequence[int],
    prompter: Prompter,
    spec: TrainingSpec,
    *,
    seed: int,
    trainable_roles: frozenset[str] = frozenset(),
    progress: Callable[[float], None],
    cancelled: Callable[[], bool],
) -> TrainOutcome:
    """Trains the adapter in place on the rows with ids `rows` (at least one).

    Adam, a fresh one in every round, as the global adapter is a new start; order of rows and dropout come from `seed`.
    Rows become tokens batch by batch, so memory does not grow with the shard. The global random state is left alone.
    With `trainable_roles`, tensors of other roles keep their bytes and take no memory for gradients.
    Raises Cancelled, TaskError when loss or gradient is not finite or memory runs out, ValueError without rows.
    """
    if not rows:
        raise ValueError("there are no rows to train on")
    started = time.monotonic()
    loss_of = ResponseLoss(model)
    parameters = model.parameters(trainable_roles)
    trained = set(parameters)
    frozen = [parameter for parameter in model.parameters() if parameter not in trained]
    optimizer = torch.optim.Adam(parameters, lr=spec.learning_rate)
    order = torch.Generator().manual_seed(seed % 2**63)
    steps = math.ceil(len(rows) / spec.batch_size)
    truncated: set[int] = set()
    model.module.train()
    for parameter in frozen:
        parameter.requires_grad_(False)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed % 2**63)
            for epoch in range(spec.local_epochs):
                loss_sum, tokens = 0.0, 0
                shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
                for step in range(steps):
                    if cancelled():
                        raise Cancelled("training was stopped")
                    ids = shuffled[step * spec.batch_size : (step + 1) * spec.batch_size]
                    batch = [prompter.encode(shard[row]) for row in ids]
                    truncated.update(row for row, encoded in zip(ids, batch, strict=True) if encoded.truncated)
                    total, count = _step(loss_of, batch, optimizer, parameters, spec.max_grad_norm)
                    loss_sum, tokens = loss_sum + total, tokens + count
                    progress((epoch * steps + step + 1) / (steps * spec.local_epochs))
    except torch.OutOfMemoryError as error:
        raise TaskError(
            "the device ran out of memory in training; the operator can lower --batch-size or --max-length"
        ) from error
    finally:
        model.module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - started
    return TrainOutcome(len(rows), loss_sum / max(tokens, 1), seconds, len(truncated), steps=steps * spec.local_epochs)


def _step(
    loss_of: ResponseLoss,
    batch: Sequence[Encoded],
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    max_grad_norm: float,
) -> tuple[float, int]:
    """One optimizer step on the mean over the batch's response tokens; the sum of their losses, and their number."""
    total, count = loss_of(batch)
    if not count:
        return 0.0, 0
    value = float(total.detach())
    if not math.isfinite(value):
        raise TaskError("the training loss is not finite; the operator can lower --learning-rate")
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(total / count)
    # A finite loss can have a gradient that is not, and no later loss would tell of the last step's.
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf)
    if not math.isfinite(float(norm)):
        raise TaskError("the training gradient is not finite; the operator can lower --learning-rate")
    optimizer.step()
    return value, count
