"""Federated k-means as both sides must know it: its unit of exact sums and its number of passes."""

from __future__ import annotations

import math

# Sums are integers in this fraction of one: 2^-32 is finer than float32 features are, and a billion rows fit.
UNIT = 2**32
# Splitting goes on to so many times the wanted centres, which are then merged. That frees k-means from poor local
# optima: of 40 planted worlds of ten topics, three lost a topic with twice as many centres, none with four times.
OVERSPLIT = 4


def splitting_passes(wanted: int) -> int:
    """Passes in which one centre doubles to `OVERSPLIT * wanted`, the first of which gives the mean of all rows."""
    return 1 + math.ceil(math.log2(OVERSPLIT * wanted))


def all_passes(wanted: int, lloyd_passes: int) -> int:
    """Every pass over the sites, the one that picks included."""
    return splitting_passes(wanted) + lloyd_passes + 1
