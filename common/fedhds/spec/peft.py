"""Parameter-efficient methods: which parameters are trained in place of the base model's."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from fedhds.errors import AdapterError
from fedhds.settings import Parameters, Variants, parameter

if TYPE_CHECKING:
    from fedhds.tensors.manifest import AdapterManifest

# Twice the largest vocabulary, and far more features than any linear layer has.
MAX_FEATURES = 1 << 20
# No model has more kinds of linear layers.
MAX_TARGETS = 256


# What LoRA's factors are to it.
LORA_ROLES = frozenset({"lora_A", "lora_B"})


class PeftSpec(Parameters):
    """Base of the methods' parameters."""

    summary: ClassVar[str]
    """What the method does, in a few words."""

    method: str = parameter(..., "What is trained in place of the base model's own weights.", setting="peft_method")

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the adapter's tensors, for aggregators that need certain ones; empty: not known beforehand."""
        return frozenset()

    @property
    def stated(self) -> dict[str, Any]:
        """Keys of adapter_config.json with the value that the run's settings give them."""
        return {}

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Raises AdapterError, naming the tensor, for a manifest that the method does not give on any model.

        A method that does not override it takes any tensors; `--max-adapter-size` bounds them in any case.
        """


class LoraSpec(PeftSpec):
    """Low-rank adapters (Hu et al. 2021)."""

    summary = "low-rank adapters beside linear layers"

    method: Literal["lora"] = "lora"
    rank: int = parameter(8, "LoRA rank.", setting="lora_rank", ge=1, le=1024)
    alpha: float = parameter(16.0, "LoRA scale numerator (the scale is alpha / rank).", setting="lora_alpha", gt=0)
    dropout: float = parameter(0.05, "Dropout on the adapter's input.", setting="lora_dropout", ge=0, lt=1)
    targets: tuple[str, ...] = parameter(
        ("all-linear",),
        "Modules that get an adapter, by the last part of their name, or all-linear.",
        setting="lora_targets",
        min_length=1,
        max_length=MAX_TARGETS,
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, targets: Any) -> Any:
        """Takes names divided by commas, too, as in the environment: no module's name has one."""
        if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
            return targets
        return tuple(name for target in targets for name in re.split(r"[,\s]+", target) if name)

    @field_validator("targets")
    @classmethod
    def _check(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if "all-linear" in targets and len(targets) > 1:
            raise ValueError("all-linear stands alone; give it, or names of modules")
        for name in targets:
            if "." in name:
                raise ValueError(f"give the last part of the module's name: {name.rpartition('.')[2]}, not {name}")
        return targets

    @property
    def roles(self) -> frozenset[str]:
        """The two factors."""
        return LORA_ROLES

    @property
    def stated(self) -> dict[str, Any]:
        """Rank, scale and dropout."""
        return {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": self.dropout}

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Tensors are pairs of A (rank, in), uniform within 1/sqrt(in) at first, and B (out, rank), zeros at first."""
        names = {tensor.name for tensor in manifest.tensors}
        for tensor in manifest.tensors:
            first = tensor.role == "lora_A"
            own, other = (".lora_A.", ".lora_B.") if first else (".lora_B.", ".lora_A.")
            rank_axis = 0 if first else 1
            if tensor.role not in ("lora_A", "lora_B") or own not in tensor.name:
                raise AdapterError(f"the manifest names {tensor.name!r}, which is no factor of a LoRA adapter")
            if tensor.name.replace(own, other) not in names:
                raise AdapterError(f"the manifest names {tensor.name!r} without the other factor of its pair")
            if len(tensor.shape) != 2 or tensor.shape[rank_axis] != self.rank:
                shape = f"({self.rank}, in)" if first else f"(out, {self.rank})"
                raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, not {shape}")
            features = tensor.shape[1 - rank_axis]
            if features > MAX_FEATURES:
                raise AdapterError(f"the manifest gives {tensor.name!r} {features} features, beyond {MAX_FEATURES}")
            bound = 1 / math.sqrt(features) if first else 0.0
            if tensor.initial.kind != ("uniform" if first else "zeros") or not math.isclose(
                tensor.initial.bound, bound, rel_tol=1e-6
            ):
                raise AdapterError(f"the manifest gives {tensor.name!r} another first value than LoRA's")
            if tensor.scale_axis != rank_axis:
                raise AdapterError(f"the manifest does not give {tensor.name!r} one scale per rank")


PEFT_SPECS: dict[str, type[PeftSpec]] = {"lora": LoraSpec}
PEFT_METHODS = Variants(PEFT_SPECS, key="method", default="lora", kind="PEFT method")
