"""How the sites' updates become the next global adapter, and in which type they travel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fedhds.settings import Parameters, Variants, parameter
from fedhds.spec.optimizer import OPTIMIZERS, NoOptimizerSpec, OptimizerSpec
from fedhds.spec.peft import LORA_ROLES
from fedhds.spec.robust import ROBUST_RULES, RobustSpec

if TYPE_CHECKING:
    from fedhds.spec.run import RunSpec
    from fedhds.tensors.safetensors import AdapterDtype

WireDtype = Literal["float32", "bfloat16", "float16", "int8"]
"""The names of fedhds.tensors.codecs.CODECS, which is not imported here because `--help` must not need numpy."""


class AggregatorSpec(Parameters):
    """Base of the aggregators' parameters."""

    summary: ClassVar[str]
    """What the aggregator does, in a few words."""

    name: str = parameter(..., "How the updates of a round are combined.", setting="aggregator")

    one_factor: ClassVar[bool] = False
    """Whether each round trains one of LoRA's factors, so that its values compare between sites."""
    averages_factors: ClassVar[bool] = False
    """Whether it averages LoRA's factors each by itself, which is not the mean of the products."""
    orders_directions: ClassVar[bool] = False
    """Whether LoRA's directions come by strength, so that the first ones are the best of their number."""

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", when the run's other settings do not fit the aggregator."""


class FedAvgSpec(AggregatorSpec):
    """Federated averaging (McMahan et al. 2017, Algorithm 1)."""

    summary = "the weighted mean of each tensor"
    averages_factors = True

    name: Literal["fedavg"] = "fedavg"


class LoraAggregatorSpec(AggregatorSpec):
    """Base of those that know LoRA's factors: the adapter has pairs of A and B, and nothing else."""

    def check(self, spec: RunSpec) -> None:
        if spec.peft.roles != LORA_ROLES:
            raise ValueError(
                f"aggregator: {self.name} needs an adapter of LoRA's factors A and B alone; set another --aggregator, "
                "or --peft-method lora without --use-dora"
            )


class AlternatingSpec(LoraAggregatorSpec):
    """RoLoRA (Chen et al. 2025, arXiv 2502.01755)."""

    summary = "B trains in odd rounds, A in even ones: the exact mean of LoRA's products, for half the uploads (RoLoRA)"
    one_factor = True

    name: Literal["alternating"] = "alternating"


class FfaSpec(LoraAggregatorSpec):
    """FFA-LoRA (Sun et al. 2024, arXiv 2403.12313)."""

    summary = "only LoRA's B trains: the exact mean of the products, for half the uploads (FFA-LoRA)"
    one_factor = True

    name: Literal["ffa"] = "ffa"


class SvdSpec(LoraAggregatorSpec):
    """FlexLoRA's aggregation (Bai et al. 2024, arXiv 2402.11505) at one rank."""

    summary = "the best approximation of the mean of LoRA's products at the adapter's rank (FlexLoRA)"
    orders_directions = True

    name: Literal["svd"] = "svd"

    def check(self, spec: RunSpec) -> None:
        """Its factors turn from round to round, so nothing of an earlier round can be added to them."""
        super().check(spec)
        if not isinstance(spec.aggregation.optimizer, NoOptimizerSpec):
            raise ValueError(
                f"server_optimizer: {spec.aggregation.optimizer.name} adds up the factors of several rounds, which "
                "have another basis in each under the aggregator svd; set --server-optimizer none, or another "
                "--aggregator"
            )
        if spec.aggregation.wire_dtype == "int8":
            raise ValueError(
                "wire_dtype: int8 adds the rounding error of a round to the factors of the next, which have another "
                "basis under the aggregator svd; set another --wire-dtype, or another --aggregator"
            )


AGGREGATOR_SPECS: dict[str, type[AggregatorSpec]] = {
    "fedavg": FedAvgSpec,
    "alternating": AlternatingSpec,
    "ffa": FfaSpec,
    "svd": SvdSpec,
}
AGGREGATORS = Variants(AGGREGATOR_SPECS, key="name", default="fedavg", kind="aggregator")


class AggregationSpec(Parameters):
    """Aggregation of a round's updates."""

    aggregator: Annotated[AggregatorSpec, AGGREGATORS] = Field(default_factory=AGGREGATORS.make_default)
    robust: Annotated[RobustSpec, ROBUST_RULES] = Field(default_factory=ROBUST_RULES.make_default)
    optimizer: Annotated[OptimizerSpec, OPTIMIZERS] = Field(default_factory=OPTIMIZERS.make_default)
    weight_by: Literal["rows", "tokens", "equal"] = parameter(
        "rows",
        "How much an update counts. rows: as many as the site trained on; tokens: those of their responses, which give "
        "the loss; equal: all sites that trained the same. --max-weight-share bounds all of them.",
    )
    wire_dtype: WireDtype = parameter(
        "float32",
        "Tensor type of adapters on the wire. int8: sites send the difference to the global adapter in 8 bits, and add "
        "the rounding error to the next one; the global adapter itself is float32.",
    )
    max_weight_share: float = parameter(
        0.5,
        "Largest share of a round's weight that the updates of one certificate's sites can have, however many rows "
        "they declare; at least 1 divided by the number of certificates. The strategy random asks none for a larger "
        "share of its budget while others have rows left.",
        gt=0,
        le=1,
    )
    max_update_norm: float = parameter(
        0.0,
        "Reject updates that differ from the round's adapter by more than this L2 norm; 0: accept any finite update.",
        ge=0,
    )
    update_norm_factor: float = parameter(
        5.0,
        "Shorten updates whose difference to the round's adapter has a larger L2 norm than this many times the median "
        "of this round's and the five before; those ten times longer still are left out, unless a --robust-rule looks "
        "at them. 0: no such bound.",
        ge=0,
    )
    max_adapter_size: int = parameter(
        2048,
        "Largest adapter, in MiB of float32 values; a site whose adapter is larger cannot register.",
        ge=1,
    )

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError, "SETTING: ...", for weights that the run's other settings keep from the coordinator."""
        if self.weight_by == "tokens" and (spec.privacy.noised or spec.secure.enabled):
            raise ValueError(
                "weight_by: the number of response tokens is an exact release about private rows, which neither noise "
                "nor --secure-aggregation covers; set --weight-by rows or equal"
            )

    @property
    def adapter_dtype(self) -> AdapterDtype:
        """Tensor type of the global adapter: the wire type, but float32 where only updates are quantized."""
        from fedhds.tensors.codecs import CODECS

        return CODECS[self.wire_dtype].adapter_dtype
