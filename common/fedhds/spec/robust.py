"""Robust rules: how a round is combined when some of its parties may send anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fedhds.settings import Parameters, Variants, parameter
from fedhds.spec.peft import LORA_ROLES

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec


class RobustSpec(Parameters):
    """Base of the robust rules' parameters."""

    summary: ClassVar[str]
    """What the rule does, in a few words."""

    rule: str = parameter(
        ...,
        "What is done against parties that send anything. All parties count the same, whatever their rows; a party is "
        "all sites of one certificate.",
        setting="robust_rule",
    )

    leaves_out: ClassVar[bool] = False
    """Whether updates that are absurdly long are left out; a rule that counts parties needs them all."""

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", when the run's other settings do not fit the rule."""


class NoRobustSpec(RobustSpec):
    """The aggregator's weighted mean."""

    summary = "nothing beyond the bounds on norms and weights"
    leaves_out = True

    rule: Literal["none"] = "none"


class ActiveRobustSpec(RobustSpec):
    """Base of the rules that assume a number of hostile parties."""

    byzantine_sites: int = parameter(
        1, "Parties of a round that may be hostile or broken; the rule is right with that many.", ge=0, le=1_000_000
    )
    mixing: Literal["none", "nearest-neighbor", "bucketing"] = parameter(
        "none",
        "What becomes of the updates before the rule, for sites whose rows differ. nearest-neighbor: each is replaced "
        "by the mean of the n - f nearest ones (Allouah et al. 2023); bucketing: means of groups that are drawn "
        "in each round (Karimireddy et al. 2022).",
        setting="robust_mixing",
    )
    bucket_size: int = parameter(
        2, "Updates in a group of --robust-mixing bucketing.", setting="robust_bucket_size", ge=1, le=1_000_000
    )

    def least_vectors(self) -> int:
        """Fewest updates after mixing for which the rule's condition holds: n > 2f."""
        return 2 * self.byzantine_sites + 1

    @property
    def least_parties(self) -> int:
        """Fewest parties whose updates the rule takes."""
        # Of n parties come ceil(n / s) buckets.
        size = self.bucket_size if self.mixing == "bucketing" else 1
        return (self.least_vectors() - 1) * size + 1

    @property
    def condition(self) -> str:
        """The condition, for messages."""
        buckets = f" in buckets of {self.bucket_size}" if self.mixing == "bucketing" else ""
        return f"{self.rule} against {self.byzantine_sites} hostile parties needs {self.least_parties}{buckets}"

    def check(self, spec: RunSpec) -> None:
        cohort = spec.rounds.smallest_cohort
        if cohort < self.least_parties:
            raise ValueError(
                f"robust_rule: {self.condition}, and a round of --min-sites {spec.rounds.min_sites} with "
                f"--cohort-fraction {spec.rounds.cohort_fraction:g} may have {cohort}; raise --min-sites, lower "
                "--byzantine-sites, or set another --robust-rule"
            )


class CoordinateSpec(ActiveRobustSpec):
    """Base of the rules that take each value by itself, so that the product of two such factors means nothing."""

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        if spec.peft.roles >= LORA_ROLES and not spec.aggregation.aggregator.one_factor:
            raise ValueError(
                f"robust_rule: {self.rule} takes each value by itself, and values of LoRA's factors A and B compare "
                f"only in rounds that train one of them, which {spec.aggregation.aggregator.name} does not have; set "
                "--aggregator alternating or ffa, or a rule on distances such as geometric-median"
            )


class MedianSpec(CoordinateSpec):
    """Coordinate-wise median (Yin et al. 2018)."""

    summary = "the median of each value"

    rule: Literal["median"] = "median"


class TrimmedMeanSpec(CoordinateSpec):
    """Coordinate-wise trimmed mean (Yin et al. 2018)."""

    summary = "the mean of each value without its f largest and f smallest"

    rule: Literal["trimmed-mean"] = "trimmed-mean"


class NeighborsSpec(ActiveRobustSpec):
    """Base of the rules that score an update by the distances to its n - f - 2 nearest neighbors."""

    def least_vectors(self) -> int:
        """2f + 3; without hostile parties, any number."""
        return 2 * self.byzantine_sites + 3 if self.byzantine_sites else 1


class KrumSpec(NeighborsSpec):
    """Krum (Blanchard et al. 2017)."""

    summary = "the update that is nearest to its n - f - 2 nearest neighbors"

    rule: Literal["krum"] = "krum"


class MultiKrumSpec(NeighborsSpec):
    """Multi-Krum (Blanchard et al. 2017)."""

    summary = "the mean of the n - f updates with Krum's best scores"

    rule: Literal["multi-krum"] = "multi-krum"


class GeometricMedianSpec(ActiveRobustSpec):
    """RFA (Pillutla et al. 2022)."""

    summary = "the point with the least sum of distances to the updates (RFA)"

    rule: Literal["geometric-median"] = "geometric-median"


class CenteredClippingSpec(ActiveRobustSpec):
    """Centered clipping (Karimireddy et al. 2021)."""

    summary = "the mean of updates that are clipped around a center, which moves there"

    rule: Literal["centered-clipping"] = "centered-clipping"
    radius: float = parameter(
        0.0,
        "Norm to which differences to the center are clipped; 0: the median of these norms.",
        setting="clipping_radius",
        ge=0,
    )
    iterations: int = parameter(3, "Steps of the center in a round.", setting="clipping_iterations", ge=1, le=1000)


ROBUST_SPECS: dict[str, type[RobustSpec]] = {
    "none": NoRobustSpec,
    "median": MedianSpec,
    "trimmed-mean": TrimmedMeanSpec,
    "krum": KrumSpec,
    "multi-krum": MultiKrumSpec,
    "geometric-median": GeometricMedianSpec,
    "centered-clipping": CenteredClippingSpec,
}
ROBUST_RULES = Variants(ROBUST_SPECS, key="rule", default="none", kind="robust rule")
