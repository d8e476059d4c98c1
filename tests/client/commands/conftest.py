"""A tiny Llama and an adapter on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedhds.spec import RunSpec
from fedhds.tensors.safetensors import write_adapter
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from tests.support.tiny import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, stored in bfloat16."""
    folder = make_model(tmp_path_factory.mktemp("llama"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder for it, as a site receives one."""
    folder = tmp_path_factory.mktemp("adapter")
    spec = RunSpec.of(model=str(llama), rounds=1, lora_rank=4)
    manifest = AdapterModel(load_base_model(str(llama), device="cpu"), spec).manifest()
    write_adapter(
        folder / "adapter_model.safetensors", manifest, lambda tensor: tensor.initial_value(3) + 0.05, "float32"
    )
    (folder / "adapter_config.json").write_text(manifest.config)
    (folder / "README.md").write_text("# A model card\n")
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    (folder / "notes.txt").write_text("not the adapter's")
    return folder
