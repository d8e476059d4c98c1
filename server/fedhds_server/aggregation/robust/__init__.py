"""Robust rules: how a round is combined when some of its parties may send anything.

A new rule is a class here, its entry below, and its parameters in `fedhds.spec.robust`.
"""

from fedhds_server.aggregation.robust.base import CoordinateRule, DistanceRule, RobustRule
from fedhds_server.aggregation.robust.centers import CenteredClipping, GeometricMedian
from fedhds_server.aggregation.robust.coordinates import Median, TrimmedMean
from fedhds_server.aggregation.robust.krum import Krum, MultiKrum
from fedhds_server.aggregation.robust.mixing import mixing_matrix

ROBUST_RULES: dict[str, RobustRule] = {
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
    "multi-krum": MultiKrum(),
    "geometric-median": GeometricMedian(),
    "centered-clipping": CenteredClipping(),
}

__all__ = ["ROBUST_RULES", "CoordinateRule", "DistanceRule", "RobustRule", "mixing_matrix"]
