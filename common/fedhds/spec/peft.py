"""Parameter-efficient methods: which parameters are trained in place of the base model's."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from fedhds.settings import Parameters, Variants, parameter


class PeftSpec(Parameters):
    """Base of the methods' parameters."""

    summary: ClassVar[str]
    """What the method does, in a few words."""

    method: str = parameter(..., "What is trained in place of the base model's own weights.", setting="peft_method")


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


PEFT_SPECS: dict[str, type[PeftSpec]] = {"lora": LoraSpec}
PEFT_METHODS = Variants(PEFT_SPECS, key="method", default="lora", kind="PEFT method")
