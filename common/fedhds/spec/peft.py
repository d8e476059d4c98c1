"""Parameter-efficient methods: which parameters are trained in place of the base model's."""

from __future__ import annotations

from typing import ClassVar, Literal

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


PEFT_SPECS: dict[str, type[PeftSpec]] = {"lora": LoraSpec}
PEFT_METHODS = Variants(PEFT_SPECS, key="method", default="lora", kind="PEFT method")
