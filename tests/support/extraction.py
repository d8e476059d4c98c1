"""A tiny Llama and rows of tokens of which tests take features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, HIDDEN, LAYERS, PAD = 50, 16, 3, 0
SEED, DIMENSION = 5, 24


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                intermediate_size=32,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                max_position_embeddings=128,
                attention_dropout=0.3,
            )
        )
    return model.eval()


ROWS = [
    [int(token) for token in np.random.default_rng(row).integers(1, VOCABULARY, size=length)]
    for row, length in enumerate([5, 1, 40, 7, 7, 23, 2, 11, 64, 3, 17])
]
