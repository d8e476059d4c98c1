"""How much an update differs from the others of its round, for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhds_server.aggregation.robust.base import squared_distances

# JSON and protobuf have no infinity.
_LARGEST = 1e30


@dataclass(frozen=True, slots=True)
class Score:
    """`distance`: the update's median distance to the others, over the median of all of these; 1 is usual.

    `cosine`: between what it changes and what the others change together, -1 to 1; 0 where one of them is nothing.
    """

    distance: float
    cosine: float


def scores_of(sites: Sequence[str], gram: npt.NDArray[np.float64], shares: npt.NDArray[np.float64]) -> dict[str, Score]:
    """A score for each of the sites' updates with these inner products (n, n); none where there is one update alone."""
    count = len(sites)
    if count < 2:
        return {}
    distances = np.sqrt(squared_distances(gram))
    others = distances[~np.eye(count, dtype=bool)].reshape(count, count - 1)
    medians = np.median(others, axis=1)
    usual = float(np.median(medians))
    scores = {}
    for index, site in enumerate(sites):
        weights = np.where(np.arange(count) == index, 0, shares)
        length = np.sqrt(max(float(weights @ gram @ weights), 0) * max(float(gram[index, index]), 0))
        cosine = float(gram[index] @ weights / length) if length > 0 else 0.0
        distance = float(medians[index]) / usual if usual > 0 else 1.0 if medians[index] == 0 else _LARGEST
        scores[site] = Score(min(distance, _LARGEST), min(1.0, max(-1.0, cosine)))
    return scores
