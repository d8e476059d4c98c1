"""Features of a shard: hidden states of every row at many layers (FedHDS, arXiv 2410.10926, 3.2), projected."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedhds.errors import TaskError

if TYPE_CHECKING:
    from fedhds_client.features.projection import FeatureSpace

# Rows are sorted by length within a window of this many batches: that leaves little padding, while no more than a
# window's tokens are held at once.
_WINDOW_BATCHES = 32
# On a CPU larger batches are no faster: 500 rows of Dolly took as long in batches of 4 as of 16 (a Llama of 192 wide,
# one thread), and a third of the memory. A GPU wants them as large as its memory allows.
_CPU_TOKENS = 1024


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
) -> Features:
    """Features of the rows `ids`, in that order, under `model` as it is: with its adapter, if PEFT put one on.

    `encode(id)` gives the tokens of a whole row, prompt and response. `progress` hears the share that is done after
    every batch; what it raises ends the extraction. The model computes in its own dtype, without dropout and, but for
    prompt methods, without its LM head, and is left in the training or evaluation mode that it was in. Memory besides
    the result: one window of token ids and one batch of hidden states.

    Raises TaskError when features are not finite, memory runs out or the space names a layer that is not there,
    ValueError for a row without tokens.
    """
    body = _body(model)
    values = np.empty((len(ids), space.dimension), dtype=np.float32)
    done = 0
    try:
        with _evaluating(model), torch.inference_mode():
            for places, tokens in _batches(encode, ids, batch_size, _max_tokens(body)):
                values[places] = _features(body, tokens, pad_id, space)
                done += len(places)
                progress(done / len(ids))
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in taking features; lower --inference-batch-size") from error
    return Features(np.asarray(ids, dtype=np.int64), values)


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


def _features(
    body: nn.Module, tokens: Sequence[Sequence[int]], pad_id: int, space: FeatureSpace
) -> npt.NDArray[np.float32]:
    """Features of one batch, float32 (batch, dimension)."""
    device = next(body.parameters()).device
    lengths = torch.tensor([len(row) for row in tokens])
    longest = int(lengths.max())
    # Padded on the right, whichever side the tokenizer would choose: positions then count from each row's start.
    padded = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in tokens])
    mask = torch.arange(longest)[None, :] < lengths[:, None]
    options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    output = body(
        input_ids=padded.to(device),
        attention_mask=mask.long().to(device),
        output_hidden_states=True,
        **options,
    )
    # Prompt methods put positions of their own in front.
    states = tuple(_of_streams(state, body)[:, -longest:] for state in output.hidden_states)
    values: npt.NDArray[np.float32] = space.features(states, lengths).cpu().numpy()
    if not np.isfinite(values).all():
        raise TaskError("the model's hidden states are not finite; the adapter has diverged or the dtype is too narrow")
    return values


def _of_streams(state: torch.Tensor, body: Any) -> torch.Tensor:
    """Hidden states (batch, tokens, hidden) of a layer that keeps several streams beside each other: their mean."""
    if state.dim() == 3:
        return state
    # Gemma 3n has them in front of the batch, models with hyper-connections behind the tokens.
    in_front = hasattr(body.config.get_text_config(decoder=True), "altup_num_inputs")
    return state.mean(dim=0 if in_front else 2)


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
