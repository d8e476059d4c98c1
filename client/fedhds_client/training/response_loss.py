"""The sum of the negative log-likelihood over response tokens, without logits for any other position."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fedhds_client.data.prompts import Encoded
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.training.head_loss import HeadLoss

Way = Literal["fused", "selected", "whole"]

# How far two ways to the same logits may be apart, as a share of the largest: rounding, and nothing that a model does.
_MAX_CHANGE = {torch.float32: 1e-3}
_TRIAL_TOKENS = 16


class ResponseLoss:
    """Calls a model on encoded rows; right padding, made here.

    With a vocabulary of 260,000 the logits of a whole batch are the peak of memory and of time, and most of them belong
    to prompts. So what the model gives to its head is caught at the response's positions, and loss and gradient are
    formed from it in small chunks ("fused"). Models that do more behind the head than is known here get the head and
    all behind it computed by themselves, for these positions alone ("selected"), and those without such a head run as a
    whole. A first trial on a few tokens finds the first way that gives the model's own logits.
    """

    def __init__(self, model: InferenceModel) -> None:
        self._module = model.module
        # With the layers of adapters that have any.
        self._inner: Any = model.base.model
        self._head: Any = self._inner.get_output_embeddings()
        self._head_loss = HeadLoss(self._head, self._inner.config)
        self._pad = int(model.tokenizer.pad_token_id)
        self.device = model.device
        self._way: Way | None = None

    def __call__(self, batch: Sequence[Encoded]) -> tuple[torch.Tensor, int]:
        """Sum of the losses in nats, a scalar with gradient, and the number of response tokens."""
        longest = max(len(row.input_ids) for row in batch)
        ids = torch.full((len(batch), longest), self._pad)
        wanted = ids.clone()
        mask = torch.zeros((len(batch), longest), dtype=torch.long)
        targeted = torch.zeros((len(batch), longest), dtype=torch.bool)
        for i, row in enumerate(batch):
            length = len(row.input_ids)
            ids[i, :length] = torch.tensor(row.input_ids)
            mask[i, :length] = 1
            wanted[i, :length] = torch.tensor(row.targets or row.input_ids)
            targeted[i, :length] = torch.tensor(row.loss)
        # The first token of all has nothing before it that could predict it.
        targeted[:, 0] = False
        ids, mask, targeted = ids.to(self.device), mask.to(self.device), targeted.to(self.device)
        # Position t predicts token t + 1.
        before = targeted.roll(-1, dims=1)
        targets = wanted.to(self.device)[targeted]
        if self._way is None:
            self._way = self._first_way(ids[:1, :_TRIAL_TOKENS], mask[:1, :_TRIAL_TOKENS])
        with self._precision():
            if self._way == "fused":
                return self._head_loss(self._hidden(ids, mask, before), targets), targets.numel()
            logits = self._logits(ids, mask, before, self._way)
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum"), targets.numel()

    def _hidden(self, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """What the head gets at the positions `before`, (positions, hidden)."""

        def catch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            raise _Caught(inputs[0][:, -ids.shape[1] :][before])

        with _hooked(self._head, catch):
            try:
                self._call(ids, mask)
            except _Caught as caught:
                return caught.hidden
        raise TypeError("the model does not call its head")

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor, way: Way) -> torch.Tensor:
        """The logits at the positions `before`, (positions, vocabulary)."""
        # Prompt methods put positions of their own in front.
        match way:
            case "fused":
                return self._head_loss.logits(self._hidden(ids, mask, before))
            case "selected":

                def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
                    return inputs[0][:, -ids.shape[1] :][before][None], *inputs[1:]

                with _hooked(self._head, select):
                    return self._call(ids, mask)[0]
            case "whole":
                return self._call(ids, mask)[:, -ids.shape[1] :][before]

    def _call(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _first_way(self, ids: torch.Tensor, mask: torch.Tensor) -> Way:
        """The first way that gives the logits of the model as a whole on these tokens."""
        if self._head is None:
            return "whole"
        training = self._module.training
        self._module.eval()
        ways: tuple[Way, ...] = ("fused", "selected")
        try:
            with torch.no_grad(), self._precision():
                whole = self._logits(ids, mask, mask.bool(), "whole").float()
                return next((way for way in ways if self._agrees(way, ids, mask, whole)), "whole")
        finally:
            self._module.train(training)

    def _agrees(self, way: Way, ids: torch.Tensor, mask: torch.Tensor, whole: torch.Tensor) -> bool:
        try:
            logits = self._logits(ids, mask, mask.bool(), way).float()
        except (IndexError, RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # The model calls its head in another way, or not at all.
            return False
        largest = whole.abs().max().clamp(min=1e-30) * _MAX_CHANGE.get(self._inner.dtype, 0.02)
        return logits.shape == whole.shape and bool((logits - whole).abs().max() <= largest)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # Adapters, which are float32, multiply in the base model's type.
        if self._inner.dtype == torch.bfloat16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


class _Caught(Exception):
    """What the head gets; the forward pass ends there, as a head over 260,000 tokens takes long even for one."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
