"""Server optimizers: how the mean of the updates becomes the next global adapter."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedhds.settings import Parameters, Variants, parameter


class OptimizerSpec(Parameters):
    """Base of the server optimizers' parameters."""

    summary: ClassVar[str]
    """What the optimizer does, in a few words."""

    name: str = parameter(..., "How the combined update changes the global adapter.", setting="server_optimizer")


class NoOptimizerSpec(OptimizerSpec):
    """The combined update as it is."""

    summary = "it is added as it is"

    name: Literal["none"] = "none"


class MomentumSpec(OptimizerSpec):
    """Momentum over rounds (FedAvgM; Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution")."""

    summary = "with momentum over rounds (FedAvgM)"

    name: Literal["momentum"] = "momentum"
    momentum: float = parameter(
        0.9, "Share of the previous round's step that is added to this one's.", setting="server_momentum", ge=0, lt=1
    )


OPTIMIZER_SPECS: dict[str, type[OptimizerSpec]] = {"none": NoOptimizerSpec, "momentum": MomentumSpec}
OPTIMIZERS = Variants(OPTIMIZER_SPECS, key="name", default="none", kind="server optimizer")
