"""The sum of the negative log-likelihood over response tokens, without logits for any other position."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from fedhds_client.data.prompts import Encoded
from fedhds_client.models.adapter import InferenceModel


class ResponseLoss:
    """Calls a model on encoded rows; right padding, made here.

    With a vocabulary of 150,000 the logits of a whole batch are the peak of memory, and most of them belong to prompts.
    So the body runs on all positions and the head on the response's alone. Models that do more between the two
    (scaling, soft capping) and adapters outside of both (prompts) give other values that way. So the first rows are
    run both ways, and a model whose values differ is run as a whole from then on.
    """

    def __init__(self, model: InferenceModel) -> None:
        self._module = model.module
        # With the layers of adapters that have any.
        self._inner: Any = model.base.model
        self._pad = int(model.tokenizer.pad_token_id)
        self.device = model.device
        self._split: bool | None = None

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
        if self._split is None:
            self._split = self._can_split(ids, mask, before)
        with self._precision():
            logits = self._response_logits(ids, mask, before, split=self._split)
        total = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return total, int(targets.numel())

    def _response_logits(
        self, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor, *, split: bool
    ) -> torch.Tensor:
        if split:
            hidden = self._body()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits: torch.Tensor = self._inner.get_output_embeddings()(hidden[before])
            return logits
        whole: torch.Tensor = self._module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        # Prompt methods put positions of their own in front.
        return whole[:, -ids.shape[1] :][before]

    def _body(self) -> Any:
        return getattr(self._inner, self._inner.base_model_prefix, None)

    def _can_split(self, ids: torch.Tensor, mask: torch.Tensor, before: torch.Tensor) -> bool:
        if self._body() is None or self._inner.get_output_embeddings() is None:
            return False
        training = self._module.training
        self._module.eval()
        with torch.no_grad(), self._precision():
            one = ids[:1], mask[:1], before[:1]
            split = self._response_logits(*one, split=True)
            whole = self._response_logits(*one, split=False)
        self._module.train(training)
        return split.shape == whole.shape and torch.allclose(split.float(), whole.float(), rtol=1e-3, atol=1e-3)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.device.type == "cuda" and self._inner.dtype == torch.bfloat16:
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()
