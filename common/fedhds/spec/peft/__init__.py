"""Parameter-efficient methods: which parameters are trained in place of the base model's; one file a method."""

from fedhds.settings import Variants
from fedhds.spec.peft.base import MAX_FEATURES, PeftSpec
from fedhds.spec.peft.beft import BeftSpec
from fedhds.spec.peft.ia3 import Ia3Spec
from fedhds.spec.peft.lora import LORA_ROLES, LoraSpec
from fedhds.spec.peft.prompts import PrefixTuningSpec, PromptSpec, PromptTuningSpec, PTuningSpec

PEFT_SPECS: dict[str, type[PeftSpec]] = {
    "lora": LoraSpec,
    "ia3": Ia3Spec,
    "beft": BeftSpec,
    "prompt-tuning": PromptTuningSpec,
    "prefix-tuning": PrefixTuningSpec,
    "p-tuning": PTuningSpec,
}
PEFT_METHODS = Variants(PEFT_SPECS, key="method", default="lora", kind="PEFT method")

__all__ = [
    "LORA_ROLES",
    "MAX_FEATURES",
    "PEFT_METHODS",
    "PEFT_SPECS",
    "BeftSpec",
    "Ia3Spec",
    "LoraSpec",
    "PTuningSpec",
    "PeftSpec",
    "PrefixTuningSpec",
    "PromptSpec",
    "PromptTuningSpec",
]
