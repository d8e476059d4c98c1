"""Features of a shard: hidden states of every row at many layers (FedHDS, arXiv 2410.10926, 3.2), projected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedhds.errors import TaskError
from fedhds_client.features.layer_states import LayerStates

if TYPE_CHECKING:
    from fedhds_client.features.projection import FeatureSpace

# Rows are sorted by length within a window of this many batches: that leaves little padding, while no more than a
# window's tokens are held at once.
_WINDOW_BATCHES = 32
# On a CPU larger batches are no faster: 500 rows of Dolly took as long in batches of 4 as of 16 (a Llama of 192 wide,
# one thread), and a third of the memory. A GPU wants them as large as its memory allows.
_CPU_TOKENS = 1024


States = Mapping[int, torch.Tensor]
"""Hidden states (batch, tokens, hidden) by layer."""


@dataclass(frozen=True)
class Features:
    """Features with the ids of their rows, which never part: row i of `values` belongs to sample `ids[i]`."""

    ids: npt.NDArray[np.int64]
    """(n,)"""
    values: npt.NDArray[np.float32]
    """(n, dimension) points of a feature space."""


def extract_features(
    model: nn.Module,
    encode: Callable[[int], Sequence[int]],
    ids: Sequence[int],
    space: FeatureSpace,
    *,
    pad_id: int,
    batch_size: int,
    progress: Callable[[float], None] = lambda share: None,
    centers: Mapping[int, torch.Tensor] | None = None,
) -> Features:
    """Features of the rows `ids`, in that order, under `model` as it is: with its adapter, if PEFT put one on.

    `encode(id)` gives the tokens that the space looks at, `centers` is what `mean_states` gives for a centered space.
    `progress` hears the share that is done after every batch; what it raises ends the extraction. The model computes in
    its own dtype, without dropout, without the layers behind the highest one that the space names and, but for prompt
    methods, without its LM head, and is left in the training or evaluation mode that it was in. Memory besides the
    result: one window of token ids and one batch of hidden states.

    Raises TaskError when features are not finite, memory runs out or the space names a layer that is not there,
    ValueError for a row without tokens.
    """
    values = np.empty((len(ids), space.dimension), dtype=np.float32)
    done = 0

    def take(places: list[int], states: States, lengths: torch.Tensor) -> None:
        nonlocal done
        batch = space.features(states, lengths, centers).cpu().numpy()
        if not np.isfinite(batch).all():
            raise TaskError(
                "the model's hidden states are not finite; the adapter has diverged or the dtype is too narrow"
            )
        values[places] = batch
        done += len(places)
        progress(done / len(ids))

    _run(model, encode, ids, space, take, pad_id=pad_id, batch_size=batch_size)
    return Features(np.asarray(ids, dtype=np.int64), values)


def mean_states(
    model: nn.Module, rows: Sequence[Sequence[int]], space: FeatureSpace, *, pad_id: int, batch_size: int
) -> dict[int, torch.Tensor]:
    """Per layer of the space the mean (hidden,) of the rows' pooled states; raises as `extract_features` does."""
    sums: dict[int, torch.Tensor] = {}

    def take(places: list[int], states: States, lengths: torch.Tensor) -> None:
        for layer, vectors in space.pooled(states, lengths).items():
            total = vectors.sum(dim=0)
            sums[layer] = sums[layer] + total if layer in sums else total

    _run(model, rows.__getitem__, range(len(rows)), space, take, pad_id=pad_id, batch_size=batch_size)
    return {layer: total / len(rows) for layer, total in sums.items()}


def _run(
    model: nn.Module,
    encode: Callable[[int], Sequence[int]],
    ids: Sequence[int],
    space: FeatureSpace,
    take: Callable[[list[int], States, torch.Tensor], None],
    *,
    pad_id: int,
    batch_size: int,
) -> None:
    """Gives `take` batch by batch: places in `ids`, states of the space's layers, and the rows' lengths in tokens."""
    body = _body(model)
    layers: LayerStates | None = None
    try:
        with _evaluating(model), torch.inference_mode():
            for places, tokens in _batches(encode, ids, batch_size, _max_tokens(body)):
                inputs, lengths = _padded(body, tokens, pad_id)
                layers = layers or LayerStates(body, space, inputs)
                take(places, layers.of(inputs), lengths)
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in taking features; lower --inference-batch-size") from error


def _batches(
    encode: Callable[[int], Sequence[int]], ids: Sequence[int], batch_size: int, max_tokens: float
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Places in `ids` and their tokens, rows of like length together, `max_tokens` with padding at most."""
    window = batch_size * _WINDOW_BATCHES
    for start in range(0, len(ids), window):
        tokens = {place: encode(ids[place]) for place in range(start, min(start + window, len(ids)))}
        empty = next((ids[place] for place, row in tokens.items() if not len(row)), None)
        if empty is not None:
            raise ValueError(f"row {empty} has no tokens")
        by_length = sorted(tokens, key=lambda place: len(tokens[place]), reverse=True)
        while by_length:
            longest = len(tokens[by_length[0]])
            size = max(1, int(min(max_tokens / longest, batch_size)))
            places, by_length = by_length[:size], by_length[size:]
            yield places, [tokens[place] for place in places]


def _max_tokens(body: nn.Module) -> float:
    return _CPU_TOKENS if next(body.parameters()).device.type == "cpu" else math.inf


def _padded(
    body: nn.Module, tokens: Sequence[Sequence[int]], pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Token ids and attention mask of a batch, each (batch, tokens), and the rows' lengths (batch,)."""
    device = next(body.parameters()).device
    lengths = torch.tensor([len(row) for row in tokens])
    longest = int(lengths.max())
    # Padded on the right, whichever side the tokenizer would choose: positions then count from each row's start.
    padded = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in tokens])
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    return {"input_ids": padded.to(device), "attention_mask": mask.long().to(device)}, lengths


def _body(model: nn.Module) -> nn.Module:
    """The transformer without its LM head, with the adapter's layers in place; an encoder is one already.

    A prompt is in no layer: only PEFT's wrapper runs it, head included.
    """
    inner: Any = model
    prompted = False
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        prompted, inner = inner.active_peft_config.is_prompt_learning, inner.get_base_model()
    if getattr(inner.config, "is_encoder_decoder", False):
        raise TaskError("features are taken with a causal model or an encoder, not with an encoder-decoder model")
    if prompted:
        return model
    body: nn.Module = inner if inner.get_output_embeddings() is None else inner.base_model
    return body


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is given back, as PEFT leaves some in another than the whole."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
