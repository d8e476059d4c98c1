"""The loss behind a language model's head, in chunks, so that the logits of all positions never exist together."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# Positions in a chunk. Measured with a vocabulary of 262,144 on a CPU: 128 take 1.7 s where plain logits take 2.3 s in
# float32 and 1.0 against 1.1 s in bfloat16; with 64, the weights are read too often. A GPU needs more work at a time.
_CHUNK = {"cpu": 128, "cuda": 1024}


class HeadLoss:
    """The head `head` of a model with the configuration `config`, and the pointwise functions that may follow it."""

    def __init__(self, head: Any, config: Any) -> None:
        self._head = head
        text = config.get_text_config()
        # Cohere multiplies, Granite divides; Gemma 2 lets no logit grow beyond a bound.
        self._scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        self._cap: float | None = getattr(text, "final_logit_softcapping", None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(positions, hidden) to (positions, vocabulary), float32."""
        return _bounded(self._head(hidden).float(), self._scale, self._cap)

    def __call__(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the losses in nats: `hidden` (positions, hidden) predicts `targets` (positions,)."""
        head, size = self._head, _CHUNK.get(hidden.device.type, 128)
        if type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters()):
            total: torch.Tensor = _Frozen.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, targets, self._scale, self._cap, size
            )
            return total
        chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
        # A head that trains, or one with an adapter: autograd computes the logits of each chunk again.
        return sum((self._again(*chunk) for chunk in chunks), hidden.new_zeros((), dtype=torch.float32))

    def _again(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        def loss(states: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(self.logits(states), targets, reduction="sum")

        total: torch.Tensor = checkpoint(loss, hidden, use_reentrant=False) if torch.is_grad_enabled() else loss(hidden)
        return total


class _Frozen(torch.autograd.Function):
    """The loss behind a linear head that does not train; its gradient is formed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        cap: float | None,
        size: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, len(targets), size):
            place = slice(begin, begin + size)
            wanted = targets[place, None]
            logits = _bounded(functional.linear(hidden[place].to(weight.dtype), weight, bias).float(), scale, cap)
            log_shares = functional.log_softmax(logits, dim=-1)
            total -= log_shares.gather(1, wanted).sum()
            if gradient is None:
                continue
            # Shares less what is wanted, times the slope of what follows the head.
            slope = log_shares.exp_().scatter_add_(1, wanted, logits.new_full(wanted.shape, -1.0))
            if cap:
                slope *= 1 - (logits / cap).square_()
            gradient[place] = ((slope.mul_(scale) if scale != 1 else slope).to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        return ctx.gradient * outputs[0].to(ctx.gradient.dtype), None, None, None, None, None, None


def _bounded(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    logits = logits if scale == 1 else logits * scale
    return torch.tanh(logits / cap) * cap if cap else logits
