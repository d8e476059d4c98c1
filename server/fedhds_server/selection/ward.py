"""Ward's linkage in linear memory: points that stand for rows, merged until so many groups are left."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

FloatArray = npt.NDArray[np.float64]


def ward_labels(points: npt.ArrayLike, weights: npt.ArrayLike, groups: int) -> npt.NDArray[np.int64]:
    """The group (n,) of each of the `points` (n, d) of `weights` (n,): `groups` of them, or n, numbered by first point.

    Merging is by the least growth of the weighted squared distances (Ward 1963), found along chains of nearest
    neighbors (Murtagh 1983): the same merges as from the whole matrix of distances, without it. Time is O(n^2 d).
    """
    means = np.array(points, dtype=np.float64)
    count = len(means)
    if groups >= count:
        return np.arange(count)
    # In order of their costs: a merge is never before those of its parts, which cost no more.
    merges = sorted(_merges(means, np.array(weights, dtype=np.float64)), key=lambda merge: merge[0])
    parents = np.arange(count)
    for _, first, second in merges[: count - max(1, groups)]:
        # The smaller number stands for both, so that a label's first point is its root.
        parents[second] = first
    # Roots come before their parts: one pass is enough.
    for index in range(count):
        parents[index] = parents[parents[index]]
    labels: npt.NDArray[np.int64] = np.unique(parents, return_inverse=True)[1]
    return labels


def _merges(means: FloatArray, weights: FloatArray) -> list[tuple[float, int, int]]:
    """All n - 1 merges: cost, and the numbers of both groups by their first points, the smaller one first.

    `means` (n, d) and `weights` (n,) are overwritten.
    """
    numbers, heights = np.arange(len(means)), np.zeros(len(means))
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    while len(numbers) > 1:
        if not chain:
            chain.append(0)
        top = chain[-1]
        costs = cdist(means[top : top + 1], means, "sqeuclidean")[0] * (
            weights[top] * weights / (weights[top] + weights)
        )
        costs[top] = np.inf
        nearest = int(costs.argmin())
        if len(chain) > 1 and costs[chain[-2]] <= costs[nearest]:
            # Both are nearest to each other.
            chain.pop()
            nearest = chain.pop()
            first, second = min(top, nearest), max(top, nearest)
            # Rounding could have it a hair below those of its parts.
            cost = max(float(costs[nearest]), float(heights[first]), float(heights[second]))
            pair = sorted((int(numbers[first]), int(numbers[second])))
            merges.append((cost, pair[0], pair[1]))
            total = weights[first] + weights[second]
            means[first] = (weights[first] * means[first] + weights[second] * means[second]) / total
            weights[first], heights[first], numbers[first] = total, cost, pair[0]
            # The last one fills the gap; numbers keep who is who.
            last = len(numbers) - 1
            for values in (means, weights, heights, numbers):
                values[second] = values[last]
            means, weights, heights, numbers = means[:last], weights[:last], heights[:last], numbers[:last]
            chain = [second if index == last else index for index in chain]
        else:
            chain.append(nearest)
    return merges
