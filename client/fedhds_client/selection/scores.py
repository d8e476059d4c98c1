"""Scores of rows, one function for each filter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fedhds_client.data.prompts import Encoded, Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.features.extraction import Features
    from fedhds_client.models.adapter import InferenceModel

FloatArray = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Of the matrix of similarities, at a time.
_BLOCK = 1024
# Below the lowest bin, and above the highest.
_EQUAL, _FIRST = 2.0**-20, 2.0**20


@dataclass(frozen=True)
class ScoredRows:
    """What scores are computed from."""

    shard: Shard
    prompter: Prompter
    model: Callable[[], InferenceModel]
    """The model under the task's adapter."""
    features: Callable[[], Features]
    """Of the whole shard."""
    progress: Callable[[float], None] = lambda share: None
    """Hears the share that is done; what it raises ends the computation."""


def alignment(rows: ScoredRows, ids: Ids) -> FloatArray:
    """Mean loss per token of each last answer without its prompt, less that with it; high where the two fit.

    Without a prompt the answer follows the row's first token, which most tokenizers begin every text with.
    """
    import torch

    from fedhds_client.training.response_loss import ResponseLoss

    loss, scores = ResponseLoss(rows.model()), np.zeros(len(ids))
    with torch.inference_mode():
        for place, number in enumerate(ids.tolist()):
            encoded = rows.prompter.encode(rows.shard[number]).last_answer()
            means = []
            for each in (_without_prompt(encoded), encoded):
                total, tokens = loss([each])
                means.append(float(total) / max(1, tokens))
            scores[place] = means[0] - means[1]
            rows.progress((place + 1) / len(ids))
    # Rows whose losses are no numbers say nothing of how they fit.
    return np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)


def _without_prompt(encoded: Encoded) -> Encoded:
    from dataclasses import replace

    start = max(1, encoded.answer_start)

    def cut(values: list[int]) -> list[int]:
        return [*values[:1], *values[start:]]

    return replace(
        encoded,
        input_ids=cut(encoded.input_ids),
        loss=[False, *encoded.loss[start:]],
        answer_start=1,
        targets=None if encoded.targets is None else cut(encoded.targets),
    )


def length(rows: ScoredRows, ids: Ids) -> FloatArray:
    """Tokens of each last answer, as log2."""
    counts = [sum(rows.prompter.encode(rows.shard[number]).last_answer().loss) for number in ids.tolist()]
    scores: FloatArray = np.log2(np.maximum(1, np.array(counts, dtype=np.float64)))
    return scores


def duplicates(rows: ScoredRows, ids: Ids) -> FloatArray:
    """Distance of each row's feature to the nearest of those before it, as log2; of several copies the first stays."""
    values = rows.features().values[ids].astype(np.float64)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    nearest = np.full(len(ids), _FIRST)
    for start in range(0, len(ids), _BLOCK):
        block = values[start : start + _BLOCK]
        similar = block @ values[: start + len(block)].T
        # No row is before itself.
        similar[np.arange(len(block))[:, None] + start <= np.arange(similar.shape[1])[None, :]] = -np.inf
        highest = similar.max(axis=1, initial=-np.inf)
        known = np.isfinite(highest)
        squares = np.maximum(0.0, 2 - 2 * highest[known])
        nearest[start : start + len(block)][known] = np.maximum(np.sqrt(squares), _EQUAL)
        rows.progress((start + len(block)) / len(ids))
    scores: FloatArray = np.log2(nearest)
    return scores


SCORES: Mapping[str, Callable[[ScoredRows, Ids], FloatArray]] = {
    "alignment": alignment,
    "length": length,
    "duplicates": duplicates,
}
