"""DP-SGD on the adapter (Abadi et al. 2016): Poisson batches, each row's gradient clipped, Gaussian noise on the sum.

Opacus takes the gradients of single rows by hooks, clips them and adds the noise. A row's loss is the mean over its own
response tokens; no number of other rows enters it. Sampling and noise come from a source that is the site's secret and
new in every round, never from the run's seed. What follows a noised gradient (Adam, the loop's own clipping, a pull to
the global adapter) sees rows through it alone, so the guarantee is that of `Cost(noise_multiplier, rate, steps)`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn

from fedhds.errors import TaskError
from fedhds.privacy.accountant import Cost
from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.peft_methods.base import adapter_state
from fedhds_client.training.batches import BatchPlan, parts_of_like_length, steps_of_pass
from fedhds_client.training.loop import TrainOutcome, train
from fedhds_client.training.response_loss import ResponseLoss

# Bytes of single rows' gradients that are there at a time.
_MAX_GRADIENTS = 1 << 28
_MAX_ROWS = 64
_REMEDY = "the operator of the coordinator can name other --lora-targets, or run without DP-SGD"


def train_private(
    model: AdapterModel,
    shard: Shard,
    rows: Sequence[int],
    prompter: Prompter,
    spec: RunSpec,
    cost: Cost,
    *,
    expected_rows: int,
    seed: int,
    round_number: int,
    trainable_roles: frozenset[str] = frozenset(),
    progress: Callable[[float], None],
    cancelled: Callable[[], bool],
) -> TrainOutcome:
    """Trains as `train` does, with the noise, the sampling and the steps of `cost`.

    Unit: one row, left out; L2 sensitivity of a step: `dp_max_grad_norm`. Gradients are divided by the batch size that
    `expected_rows` gives, however many rows there are: with none, there are steps of noise alone. The guarantee lapses
    when the outcome's loss, counts or times are told with the adapter. Raises TaskError for weights that Opacus cannot
    take rows' gradients of, or that did not move; else as `train` does.
    """
    private = spec.privacy.training
    source = torch.Generator(model.device).manual_seed(int.from_bytes(os.urandom(8)) >> 1)
    made: list[PrivateGradient] = []

    def gradient(loss_of: ResponseLoss, parameters: Sequence[nn.Parameter]) -> PrivateGradient:
        made.append(
            PrivateGradient(
                model,
                loss_of,
                parameters,
                max_grad_norm=private.max_grad_norm,
                noise_multiplier=cost.noise_multiplier,
                expected_batch_size=cost.sample_rate * expected_rows,
                source=source,
            )
        )
        return made[0]

    plan = BatchPlan(cost.steps, steps_of_pass(spec.training, expected_rows), poisson_batches(rows, cost, source))
    try:
        outcome = train(
            model,
            shard,
            rows,
            prompter,
            spec.training,
            seed=seed,
            round_number=round_number,
            rounds=spec.rounds.count,
            trainable_roles=trainable_roles,
            step_gradient=gradient,
            plan=plan,
            progress=progress,
            cancelled=cancelled,
        )
        for each in made:
            each.check_moved()
    finally:
        for each in made:
            each.close()
    return outcome


def poisson_batches(rows: Sequence[int], cost: Cost, source: torch.Generator) -> Iterator[list[int]]:
    """`cost.steps` batches; every row is in each by itself with `cost.sample_rate`, so that one may be empty."""
    for _ in range(cost.steps):
        drawn = torch.rand(len(rows), generator=source, device=source.device, dtype=torch.float64) < cost.sample_rate
        yield [rows[index] for index in drawn.nonzero()[:, 0].tolist()]


class PrivateGradient:
    """The sum of the batch's clipped gradients with noise, over the expected number of rows; no loss is told."""

    def __init__(
        self,
        model: AdapterModel,
        loss_of: ResponseLoss,
        parameters: Sequence[nn.Parameter],
        *,
        max_grad_norm: float,
        noise_multiplier: float,
        expected_batch_size: float,
        source: torch.Generator,
    ) -> None:
        self._model, self._loss_of, self._parameters = model, loss_of, list(parameters)
        self._expected = expected_batch_size
        self._optimizer = DPOptimizer(
            # It clips and adds the noise here; the loop has an optimizer of its own that makes the steps.
            torch.optim.SGD(self._parameters, lr=0.0),
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=None,
            loss_reduction="sum",
            generator=source,
        )
        size = 4 * sum(parameter.numel() for parameter in self._parameters)
        self._max_rows = max(1, min(_MAX_ROWS, _MAX_GRADIENTS // size))
        self._hooks: Any = None
        self._first = [parameter.detach().clone() for parameter in self._parameters]

    def __call__(self, batch: Sequence[Encoded]) -> tuple[float, int]:
        if self._hooks is None:
            self._hooks = self._hooked()
        for parameter in self._parameters:
            parameter.summed_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
        batch = [row for row in batch if any(row.loss[1:])]
        lengths = [len(row.input_ids) for row in batch]
        for part in parts_of_like_length(lengths, max_rows=self._max_rows, overhead=0) if batch else ():
            self._add([batch[index] for index in part])
        self._optimizer.add_noise()
        for parameter in self._parameters:
            del parameter.summed_grad  # type: ignore[attr-defined]
            assert parameter.grad is not None
            parameter.grad /= self._expected
        return 0.0, 0

    def check_moved(self) -> None:
        """Raises TaskError when training left the weights as they were, or trained others than those of the adapter."""
        moved = [not torch.equal(before, now) for before, now in zip(self._first, self._parameters, strict=True)]
        sent = {tensor.data_ptr() for tensor in adapter_state(self._model.module).values()}
        if not all(moved) or any(parameter.data_ptr() not in sent for parameter in self._parameters):
            raise TaskError("DP-SGD trained other weights than those that are sent; report this as a defect of fedhds")

    def close(self) -> None:
        """Takes the hooks off the model."""
        if self._hooks is not None:
            self._clear()
            self._hooks.remove_hooks()
            self._hooks = None

    def _hooked(self) -> Any:
        """Puts the hooks on: now that only the parameters that train take gradients. Raises TaskError."""
        trained = {id(parameter) for parameter in self._parameters}
        owners = [
            (name, module)
            for name, module in self._model.module.named_modules()
            if any(id(parameter) in trained for parameter in module.parameters(recurse=False))
        ]
        for name, module in owners:
            if type(module) is not nn.Linear:
                raise TaskError(f"DP-SGD trains linear layers' weights alone, and {name} is none; {_REMEDY}")
            if module.weight.dtype != torch.float32:
                raise TaskError(f"DP-SGD trains no quantized weights, and {name} has {module.weight.dtype}; {_REMEDY}")
        places = [parameter.data_ptr() for parameter in self._model.module.parameters()]
        owned = [parameter for _, module in owners for parameter in module.parameters(recurse=False)]
        if any(places.count(parameter.data_ptr()) > 1 for parameter in self._parameters) or len(owned) != len(trained):
            raise TaskError(f"DP-SGD trains no weights that several layers share, and some do here; {_REMEDY}")
        try:
            return GradSampleHooks(self._model.module, loss_reduction="sum")
        except (NotImplementedError, ValueError) as error:
            raise TaskError(f"Opacus cannot take rows' gradients on this model; {_REMEDY}") from error

    def _add(self, rows: Sequence[Encoded]) -> None:
        """Adds the clipped gradients of `rows` to the sums; in halves where memory does not suffice for all."""
        try:
            with warnings.catch_warnings():
                # The input of the first layer needs no gradient, and its weights' come by its output.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                total, _ = self._loss_of(rows)
                torch.autograd.backward(total)
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise TaskError(
                    "the device ran out of memory in training, with a single row; the operator can lower --max-length"
                ) from error
            self._clear()
            self._max_rows = len(rows) // 2
            for part in (rows[: self._max_rows], rows[self._max_rows :]):
                self._add(part)
            return
        self._scale(rows)
        self._optimizer.clip_and_accumulate()
        self._clear()

    def _scale(self, rows: Sequence[Encoded]) -> None:
        """Makes gradients of sums those of means over a row's own tokens; one that is not finite counts as zero."""
        counts = torch.tensor([sum(row.loss[1:]) for row in rows], device=self._model.device)
        usable = torch.ones(len(rows), dtype=torch.bool, device=self._model.device)
        for parameter in self._parameters:
            gradients = getattr(parameter, "grad_sample", None)
            if not isinstance(gradients, torch.Tensor) or len(gradients) != len(rows):
                raise TaskError(
                    f"Opacus gives no gradient of each row on this model: its layers mix rows, or run twice; {_REMEDY}"
                )
            usable &= gradients.flatten(1).isfinite().all(dim=1)
        for parameter in self._parameters:
            gradients = parameter.grad_sample  # type: ignore[attr-defined]
            gradients /= counts.view(-1, *[1] * (gradients.dim() - 1))
            gradients[~usable] = 0

    def _clear(self) -> None:
        """Drops what hooks left behind."""
        for module in self._model.module.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):
                    delattr(module, name)
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
