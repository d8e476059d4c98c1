"""Folders of tiny models for the tests of this folder, and ways to change them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from fedhds.spec import RunSpec


def spec_of(model: object = "m", **fields: Any) -> RunSpec:
    """A run's specification."""
    return RunSpec.of(**({"model": str(model), "rounds": 1, "lora_rank": 4} | fields))


def make_other_model(folder: Path, tokenizer: Path, kind: str) -> Path:
    """Writes a tiny GPT-2 or GPT-NeoX with the tokenizer of another model."""
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    else:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
            )
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def copy_model(source: Path, folder: Path) -> Path:
    """A copy of a model's folder."""
    shutil.copytree(source, folder)
    return folder


def edit_json(path: Path, **fields: object) -> None:
    """Sets fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weight(folder: Path) -> None:
    """Changes one weight by very little."""
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] += 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
