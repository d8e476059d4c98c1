"""Federated k-means as both sides must know it: the unit of exact sums and the number of passes."""

from __future__ import annotations

import math

# Sums are integers in this fraction of one: 2^-32 is finer than float32 features are, and a billion rows fit.
SUM_UNIT = 2**32
# Splitting goes on to this many times the wanted centers, which are then merged. That frees k-means from poor local
# optima: of 40 planted worlds of ten topics, three lost a topic with twice as many centers, none with four times.
OVERSPLIT = 4


def splitting_passes(centers: int) -> int:
    """Passes in which one center doubles to `OVERSPLIT * centers`, the first of which gives the mean of all rows."""
    return 1 + math.ceil(math.log2(OVERSPLIT * centers))


def total_passes(centers: int, kmeans_iterations: int) -> int:
    """All passes over the sites: splitting, iterations with all centers, and the one that picks rows."""
    return splitting_passes(centers) + kmeans_iterations + 1
