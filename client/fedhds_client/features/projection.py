"""The space of features: hidden states of selected layers, pooled and projected, the same at every site.

The projection follows from the run's specification alone: random signs (Achlioptas 2003, "Database-friendly random
projections", Thm 1.1), drawn from a counter-based generator whose stream numpy keeps fixed, so that it is bit-identical
on every machine. Nothing is fitted on rows. It is applied to each batch as it comes, so that no more than one batch of
hidden states is in memory, however many layers there are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedhds.errors import TaskError
from fedhds_client.features.public_rows import PUBLIC_DIGEST

if TYPE_CHECKING:
    from fedhds.spec import RunSpec


def signs(*, seed: int, layer: int, hidden: int, dimension: int) -> npt.NDArray[np.int8]:
    """Random signs (hidden, dimension), each -1 or 1, for one layer; bit-identical wherever it is called."""
    key = hashlib.sha256(f"fedhds projection/{seed}/{layer}/{hidden}/{dimension}".encode()).digest()
    count = hidden * dimension
    words = np.random.Philox(key=int.from_bytes(key[:16], "big")).random_raw(-(-count // 64))
    # Bytes in a fixed order: the machine's own would give others elsewhere.
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[:count]
    return (bits.astype(np.int8) * 2 - 1).reshape(hidden, dimension)


Pooling = Literal["last", "mean", "prompt-last"]


@dataclass(frozen=True)
class FeatureSpace:
    """How hidden states become features of `dimension` values."""

    seed: int
    dimension: int
    layers: str = "all"
    """all, last, middle, or numbers such as 0,6,-1, where 0 is the embeddings' output."""
    pooling: Pooling = "last"
    """Hidden state of the last token, or the mean over a row's tokens; prompt-last is the last token of rows that are
    cut before their answer."""
    shared: bool = False
    """Every layer's vector and the result are normalized to L2 norm 1, so that sites' features compare."""
    centered: bool = False
    """The mean over public rows (fedhds_client.features.public_rows) is taken off every layer's vector first."""
    _signs: dict[tuple[int, torch.device], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, spec: RunSpec) -> FeatureSpace:
        """The space that a run's specification describes."""
        shared, features = spec.selection.strategy.shared_space, spec.selection.features
        pooling = features.pooling
        if pooling == "auto":
            pooling = "mean" if shared else "last"
        return cls(spec.seed, features.dimension, features.layers, pooling, shared, features.centering == "public")

    @property
    def key(self) -> str:
        """Names the space: equal exactly when the features of equal states are."""
        centering = f"/{PUBLIC_DIGEST}" if self.centered else ""
        return f"{self.seed}/{self.dimension}/{self.layers}/{self.pooling}/{self.shared}{centering}"

    def layer_indices(self, count: int) -> list[int]:
        """Indices of the layers in use, out of `count`, ascending; raises TaskError for a layer that is not there."""
        if self.layers == "all":
            return list(range(count))
        if self.layers == "last":
            return [count - 1]
        if self.layers == "middle":
            return [count // 2]
        numbers = [int(text) for text in self.layers.split(",")]
        beyond = next((number for number in numbers if not -count <= number < count), None)
        if beyond is not None:
            raise TaskError(
                f"--feature-layers, which the operator of the coordinator sets, names layer {beyond}; the model has 0 "
                f"(embeddings) to {count - 1}"
            )
        return sorted({number % count for number in numbers})

    def pooled(self, states: Mapping[int, torch.Tensor], lengths: torch.Tensor) -> dict[int, torch.Tensor]:
        """One vector per row of each layer's hidden states (batch, tokens, hidden), padded on the right; float32.

        `lengths` (batch,): tokens of every row.
        """
        # On each layer's own device: a model that is spread over several GPUs has them on several.
        return {layer: self._pooled(state, lengths.to(state.device)) for layer, state in states.items()}

    def features(
        self,
        states: Mapping[int, torch.Tensor],
        lengths: torch.Tensor,
        centers: Mapping[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Projects what `pooled` makes of the states of this space's layers, less the `centers`; (batch, dimension).

        `centers`: per layer a vector (hidden,), of a centered space. float32 throughout, so that features agree between
        thread counts and devices to 1e-4 of their norm for float32 models; for 16-bit models as far as their states do.
        """
        total: torch.Tensor | None = None
        for layer, vectors in sorted(self.pooled(states, lengths).items()):
            if centers is not None:
                vectors = vectors - centers[layer].to(vectors.device)
            if self.shared:
                vectors = nn.functional.normalize(vectors, dim=1) / math.sqrt(len(states))
            projected = vectors @ self._layer_signs(layer, vectors.shape[1], vectors.device).float()
            total = projected if total is None else total + projected.to(total.device)
        assert total is not None
        total = total / math.sqrt(self.dimension)
        return nn.functional.normalize(total, dim=1) if self.shared else total

    def _pooled(self, states: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if self.pooling != "mean":
            return states[torch.arange(len(states), device=states.device), lengths - 1].float()
        mask = torch.arange(states.shape[1], device=states.device)[None, :] < lengths[:, None]
        # where, not a product: states at padding may be anything.
        summed = torch.where(mask[:, :, None], states.float(), 0.0).sum(dim=1)
        return summed / lengths[:, None]

    def _layer_signs(self, layer: int, hidden: int, device: torch.device) -> torch.Tensor:
        """As bytes: a quarter of what float32 takes for a model of many wide layers."""
        layer_signs = self._signs.get((layer, device))
        if layer_signs is None or layer_signs.shape[0] != hidden:
            values = signs(seed=self.seed, layer=layer, hidden=hidden, dimension=self.dimension)
            layer_signs = self._signs[layer, device] = torch.from_numpy(values).to(device)
        return layer_signs
