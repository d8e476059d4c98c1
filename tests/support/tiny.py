"""A tiny random Llama with a byte-level tokenizer, and rows for it, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path


def make_model(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """Writes a causal LM of some ten thousand random weights, with its tokenizer, to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, topics: dict[str, int], *, canary: str = "") -> Path:
    """Writes Dolly rows: per topic so many near-duplicates. `canary` is planted in every text field."""
    with path.open("w", encoding="utf-8") as file:
        for topic, count in topics.items():
            for number in range(count):
                row = {
                    "instruction": f"{canary}Say {topic} number {number}.",
                    "context": f"{canary}The word is {topic}." if number % 2 else "",
                    "response": f"{canary}{topic} {number}",
                    "category": topic,
                }
                file.write(json.dumps(row) + "\n")
    return path


def logits(model: Path, adapter: Path) -> list[float]:
    """Logits of the base model under a PEFT folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        return [float(x) for x in tuned(input_ids=torch.tensor([[1, 40, 41, 42]])).logits[0, -1, :8]]
