"""Secure aggregation: the coordinator learns the sum of a round's updates and no single one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhds.settings import Parameters, parameter
from fedhds.spec.aggregation import AlternatingSpec, FedAvgSpec, FfaSpec
from fedhds.spec.amounts import MAX_COUNT
from fedhds.spec.robust import NoRobustSpec

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec

# Rules that need nothing of the updates but their weighted sum.
_MEANS = (FedAvgSpec, AlternatingSpec, FfaSpec)


class SecureSpec(Parameters):
    """Whether updates are masked, and for how many sites their sum is worth it."""

    enabled: bool = parameter(
        False,
        "Sites mask their updates so that this coordinator learns the sum of a round's updates and no single one. It "
        "needs TLS, as sites check each other's certificates.",
        setting="secure_aggregation",
    )
    min_sites: int = parameter(
        5,
        "Fewest certificates whose sites are in a round's sum; with fewer, the round is not run.",
        setting="min_secure_sites",
        ge=3,
        le=MAX_COUNT,
    )
    threshold: float = parameter(
        2 / 3,
        "Share of a round's sites that must stay until its end to unmask the sum, rounded up and more than half in any "
        "case. With fewer, the round ends without a result; as many that work together with this coordinator could "
        "unmask each update.",
        setting="secure_threshold",
        gt=0.5,
        le=1,
    )
    clip_norm: float = parameter(
        10.0,
        "L2 norm to which each site clips its difference to the global adapter before it masks it. Rounding to "
        "integers has steps of this norm divided by 2^31.",
        setting="secure_clip_norm",
        gt=0,
        le=1e6,
    )

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", for what needs single updates."""
        if not self.enabled:
            return
        rounds, aggregation = spec.rounds, spec.aggregation
        if not isinstance(aggregation.aggregator, _MEANS):
            raise ValueError(
                f"aggregator: {aggregation.aggregator.name} compares or decomposes single updates, which "
                "--secure-aggregation hides; set --aggregator fedavg, alternating or ffa, or drop it"
            )
        if not isinstance(aggregation.robust, NoRobustSpec):
            raise ValueError(
                f"robust_rule: {aggregation.robust.rule} compares single updates, which --secure-aggregation hides; "
                "set --robust-rule none, or drop it"
            )
        if aggregation.wire_dtype == "int8":
            raise ValueError(
                "wire_dtype: int8 has scales of each site's own, which do not add up under --secure-aggregation's "
                "masks; set another --wire-dtype, or drop it"
            )
        if aggregation.max_update_norm:
            raise ValueError(
                "max_update_norm: the coordinator cannot measure updates that --secure-aggregation hides; sites clip "
                "theirs to --secure-clip-norm instead"
            )
        if rounds.over_selection:
            raise ValueError(
                "over_selection: each site that a secure round leaves behind costs its sites shares and time; set it "
                "to 0, or drop --secure-aggregation"
            )
