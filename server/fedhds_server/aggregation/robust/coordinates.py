"""Rules that take each value by itself (Yin et al. 2018, "Byzantine-Robust Distributed Learning", Def. 1 and 2)."""

from __future__ import annotations

import numpy as np

from fedhds.spec.robust import ActiveRobustSpec
from fedhds_server.aggregation.robust.base import CoordinateRule, Doubles


class Median(CoordinateRule):
    """The median; of an even number, the mean of the middle two."""

    description = "the median of each value over parties"

    def combine(self, parameters: ActiveRobustSpec, values: Doubles) -> Doubles:
        result: Doubles = np.median(values, axis=0)
        return result


class TrimmedMean(CoordinateRule):
    """The mean without the f largest and the f smallest."""

    description = "the mean of each value over parties, without its largest and smallest ones"

    def combine(self, parameters: ActiveRobustSpec, values: Doubles) -> Doubles:
        trimmed = parameters.byzantine_sites
        result: Doubles = np.sort(values, axis=0)[trimmed : len(values) - trimmed].mean(axis=0)
        return result
