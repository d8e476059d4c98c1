"""PEFT methods: how each describes its adapter to PEFT and to the coordinator; one file per method."""

from fedhds_client.peft_methods.base import PeftMethod
from fedhds_client.peft_methods.beft import Beft
from fedhds_client.peft_methods.ia3 import Ia3
from fedhds_client.peft_methods.lora import Lora
from fedhds_client.peft_methods.prompts import PrefixTuning, PromptTuning, PTuning

PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": Lora(),
    "ia3": Ia3(),
    "beft": Beft(),
    "prompt-tuning": PromptTuning(),
    "prefix-tuning": PrefixTuning(),
    "p-tuning": PTuning(),
}

__all__ = ["PEFT_METHODS", "PeftMethod"]
