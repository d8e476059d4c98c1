"""Krum and Multi-Krum (Blanchard et al. 2017, "Machine Learning with Adversaries", Sec. 4)."""

from __future__ import annotations

import numpy as np

from fedhds.spec.robust import ActiveRobustSpec
from fedhds_server.aggregation.robust.base import DistanceRule, Doubles, squared_distances


def scores(gram: Doubles, hostile: int) -> Doubles:
    """Sums (n,) of the squared distances of each vector to its n - f - 2 nearest others, one at least."""
    count = len(gram)
    neighbors = min(max(count - hostile - 2, 1), count - 1)
    # The first is the vector itself.
    nearest = np.sort(squared_distances(gram), axis=1)[:, 1 : 1 + neighbors]
    result: Doubles = nearest.sum(axis=1)
    return result


class Krum(DistanceRule):
    """The update with the least score; of equal ones the first."""

    description = "Krum: the update of one party, the nearest to its neighbors"

    def weights(self, parameters: ActiveRobustSpec, gram: Doubles) -> Doubles:
        weights = np.zeros(len(gram))
        weights[scores(gram, parameters.byzantine_sites).argmin()] = 1
        return weights


class MultiKrum(DistanceRule):
    """The mean of the n - f updates with the least scores."""

    description = "Multi-Krum: the mean of the updates that are nearest to their neighbors"

    def weights(self, parameters: ActiveRobustSpec, gram: Doubles) -> Doubles:
        taken = len(gram) - parameters.byzantine_sites
        weights = np.zeros(len(gram))
        weights[np.argsort(scores(gram, parameters.byzantine_sites), kind="stable")[:taken]] = 1 / taken
        return weights
