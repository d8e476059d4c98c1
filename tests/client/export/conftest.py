"""Adapters that PEFT itself made, on tiny models of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support.architectures import tiny_config, tiny_model

Made = tuple[Any, Any, Path]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Made]:
    """Makes (base model, PEFT's model, adapter folder) of an architecture; words are LoraConfig's, or `config`."""

    def make(architecture: str, config: PeftConfig | None = None, **words: Any) -> Made:
        own = tiny_config(architecture)
        folder = tmp_path / "base"
        tiny_model(own).save_pretrained(folder)
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        settings: dict[str, Any] = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        settings |= words
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tuned: Any = get_peft_model(loaded, config or LoraConfig(**settings)).eval()
        with torch.no_grad():
            for number, parameter in enumerate(p for p in tuned.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return base, tuned, tmp_path / "adapter"

    return make
