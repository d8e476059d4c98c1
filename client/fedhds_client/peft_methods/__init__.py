"""PEFT methods: how each describes its adapter to PEFT and to the coordinator; one file per method."""

from fedhds_client.peft_methods.base import PeftMethod
from fedhds_client.peft_methods.lora import Lora

PEFT_METHODS: dict[str, PeftMethod] = {"lora": Lora()}

__all__ = ["PEFT_METHODS", "PeftMethod"]
