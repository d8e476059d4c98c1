"""Gradients of the adapter on single rows, as sketches of a few hundred values that compare between sites.

A count sketch (Charikar, Chen & Farach-Colton 2002): every value of the gradient is added, with a random sign, to one
of `dimension` sums. Inner products keep their expectation. Places and signs follow from the run's seed and the tensor's
name alone, so nothing as large as a matrix of signs is kept, and all sites' sketches are in one space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedhds.errors import TaskError
from fedhds_client.features.extraction import Features
from fedhds_client.training.response_loss import ResponseLoss

if TYPE_CHECKING:
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.models.adapter import AdapterModel


def gradient_sketches(
    model: AdapterModel,
    prompter: Prompter,
    shard: Shard,
    ids: Sequence[int],
    *,
    seed: int,
    dimension: int,
    progress: Callable[[float], None] = lambda share: None,
) -> Features:
    """Sketches (n, dimension), float32 of length 1, of the gradients of the rows' mean losses per response token.

    `model` has the adapter at which gradients are taken; it is left without gradients. Raises TaskError where one is
    not finite, and what `progress` raises.
    """
    named = [(name, each) for name, each in model.module.named_parameters() if each.requires_grad]
    places = {name: _places(seed, name, each.numel(), dimension, each.device) for name, each in named}
    loss, values = ResponseLoss(model), np.zeros((len(ids), dimension), dtype=np.float32)
    for number, row in enumerate(ids):
        total, tokens = loss([prompter.encode(shard[row])])
        gradients = torch.autograd.grad(total / max(1, tokens), [each for _, each in named], allow_unused=True)
        sketch = torch.zeros(dimension)
        for (name, _), gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                bucket, sign = places[name]
                own = torch.zeros(dimension, device=gradient.device)
                sketch += own.index_add_(0, bucket, gradient.detach().float().ravel() * sign).cpu()
        if not torch.isfinite(sketch).all():
            raise TaskError("a row's gradient is not finite; the adapter has diverged or the dtype is too narrow")
        values[number] = torch.nn.functional.normalize(sketch, dim=0).numpy()
        progress((number + 1) / len(ids))
    return Features(np.asarray(ids, dtype=np.int64), values)


def _places(
    seed: int, name: str, count: int, dimension: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum (count,) and sign (count,) of every value of one tensor; the same on every machine."""
    key = hashlib.sha256(f"fedhds sketch/{seed}/{name}/{count}/{dimension}".encode()).digest()
    words = np.random.Philox(key=int.from_bytes(key[:16], "big")).random_raw(count)
    bucket = torch.from_numpy(((words >> np.uint64(1)) % np.uint64(dimension)).astype(np.int64))
    sign = torch.from_numpy((words & np.uint64(1)).astype(np.int8) * 2 - 1)
    return bucket.to(device), sign.to(device).float()
