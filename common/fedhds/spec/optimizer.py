"""Server optimizers: how the mean of the updates becomes the next global adapter."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

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


def _learning_rate() -> Any:
    # The paper tunes it for each task. 0.001 is what OpenFedLLM uses for LoRA, whose values are about 0.01.
    return parameter(
        1e-3, "Learning rate: about the step of each value per round.", setting="server_learning_rate", gt=0
    )


def _tau() -> Any:
    return parameter(
        1e-3,
        "Added to the root of the squares; the larger, the more do steps follow the sizes of the updates.",
        setting="server_tau",
        gt=0,
    )


def _beta1() -> Any:
    return parameter(
        0.9, "Share of the previous rounds in the mean of the updates.", setting="server_beta1", ge=0, lt=1
    )


def _beta2() -> Any:
    return parameter(
        0.99, "Share of the previous rounds in the mean of the squares.", setting="server_beta2", ge=0, lt=1
    )


class AdagradSpec(OptimizerSpec):
    """FedAdagrad (Reddi et al. 2021, "Adaptive Federated Optimization", Alg. 2, with beta 1 = 0 as in Sec. 5)."""

    summary = "with steps per value that shrink as squares add up (FedAdagrad)"

    name: Literal["adagrad"] = "adagrad"
    learning_rate: float = _learning_rate()
    tau: float = _tau()


class YogiSpec(OptimizerSpec):
    """FedYogi (Reddi et al. 2021, Alg. 2)."""

    summary = "like adam, but squares grow and shrink slowly (FedYogi)"

    name: Literal["yogi"] = "yogi"
    learning_rate: float = _learning_rate()
    beta1: float = _beta1()
    beta2: float = _beta2()
    tau: float = _tau()


class AdamSpec(OptimizerSpec):
    """FedAdam (Reddi et al. 2021, Alg. 2)."""

    summary = "with steps per value by running means of updates and squares (FedAdam)"

    name: Literal["adam"] = "adam"
    learning_rate: float = _learning_rate()
    beta1: float = _beta1()
    beta2: float = _beta2()
    tau: float = _tau()


OPTIMIZER_SPECS: dict[str, type[OptimizerSpec]] = {
    "none": NoOptimizerSpec,
    "momentum": MomentumSpec,
    "adagrad": AdagradSpec,
    "yogi": YogiSpec,
    "adam": AdamSpec,
}
OPTIMIZERS = Variants(OPTIMIZER_SPECS, key="name", default="none", kind="server optimizer")
