"""The rows of a site assigned to the centers of federated k-means, and exact sums over them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedhds.kmeans import SUM_UNIT
from fedhds_client.features.extraction import Features

# Rows whose distances to all centers are in memory at once.
_BLOCK = 4096
# So many rows of a cluster are spread; a budget that wants more of one cluster takes the rest by nearness.
_SPREAD = 256


@dataclass(frozen=True)
class Assignment:
    """Every row's nearest center."""

    ids: npt.NDArray[np.int64]
    """(n,)"""
    values: npt.NDArray[np.float32]
    """(n, d) features."""
    centers: npt.NDArray[np.float64]
    """(k, d)"""
    labels: npt.NDArray[np.int64]
    """(n,) center of every row; of equally near ones the first."""
    squares: npt.NDArray[np.float64]
    """(n,) squared distance of every row to its center; follows from the row and the center alone."""

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """(k,) rows."""
        return np.bincount(self.labels, minlength=len(self.centers))

    @property
    def sums(self) -> npt.NDArray[np.int64]:
        """(k, d) sums of features in units of 2^-32; integers, so that no order of summing matters."""
        sums = np.zeros(self.centers.shape, dtype=np.int64)
        for start in range(0, len(self.ids), _BLOCK):
            block = slice(start, start + _BLOCK)
            np.add.at(
                sums, self.labels[block], np.rint(self.values[block].astype(np.float64) * SUM_UNIT).astype(np.int64)
            )
        return sums

    def members(self, *, spread: bool) -> list[list[int]]:
        """Per center its sample ids: nearest first, equally near ones by id; or far apart from those before.

        `spread` starts with the nearest row, too, and then takes the row that is farthest from all that were taken
        (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"): several rows of one coarse cluster
        then say different things.
        """
        order = np.lexsort((self.ids, self.squares, self.labels))
        ends = np.searchsorted(self.labels[order], np.arange(len(self.centers) + 1))
        clusters = [order[first:last] for first, last in itertools.pairwise(ends)]
        if spread:
            clusters = [self._spread(cluster) for cluster in clusters]
        return [[int(self.ids[row]) for row in cluster] for cluster in clusters]

    def _spread(self, cluster: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        rest = list(cluster)
        order: list[int] = []
        nearest = np.full(len(cluster), np.inf)
        while rest and len(order) < _SPREAD:
            place = int(nearest.argmax()) if order else 0
            row = rest.pop(place)
            order.append(row)
            nearest = np.delete(nearest, place)
            apart = ((self.values[rest] - self.values[row]) ** 2).sum(axis=1) if rest else nearest
            nearest = np.minimum(nearest, apart)
        return np.array([*order, *rest], dtype=np.int64)


def assign(features: Features, centers: npt.NDArray[np.floating], *, norm: float = 0.0) -> Assignment:
    """Assigns rows to their nearest `centers` (k, d); rows longer than `norm` are clipped to it first (0: none is)."""
    from scipy.spatial.distance import cdist

    values = features.values
    if norm:
        lengths = np.linalg.norm(values, axis=1, keepdims=True)
        # A hair below, for float32 rounds: the guarantee rests on no row being longer.
        values = values * np.minimum(1.0, norm * (1 - 1e-6) / np.maximum(lengths, norm * 1e-6)).astype(np.float32)
    places = np.asarray(centers, dtype=np.float64)
    labels = np.zeros(len(values), dtype=np.int64)
    squares = np.zeros(len(values))
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        distances = cdist(block, places, "sqeuclidean")
        labels[start : start + _BLOCK] = distances.argmin(axis=1)
        squares[start : start + _BLOCK] = distances.min(axis=1, initial=np.inf)
    return Assignment(features.ids, values, places, labels, squares)
