"""Tokens that a base model cannot say: their rows of the output matrix were never trained, and adapters keep them."""

from __future__ import annotations

from typing import Any

import torch

# Against rows that were trained. Rows that were added to a vocabulary are off the mean by some 0.003 %.
_SHARE = 0.02
_SAMPLE = 1000


def can_say(model: Any, token: int) -> bool:
    """Whether the output matrix of a causal LM has a row for `token` that can win over all others.

    transformers makes the mean of the others of a row that is added to a vocabulary, and the mean never wins. Some
    models are published with rows of zeros. True where the matrix cannot be read (it is quantized, say).
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None or not weight.is_floating_point() or weight.dim() != 2:
        return True
    with torch.no_grad():
        if token >= len(weight):
            return False
        mean = weight.mean(dim=0, dtype=torch.float32)
        sample = weight[:: max(1, len(weight) // _SAMPLE)].float()
        row = weight[token].float()
        apart, size = (row - mean).norm(), row.norm()
        usual_apart, usual_size = (sample - mean).norm(dim=1).median(), sample.norm(dim=1).median()
        return bool(apart > _SHARE * usual_apart and size > _SHARE * usual_size)
