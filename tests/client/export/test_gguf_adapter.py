"""Adapters in GGUF: read back by gguf's own reader, they change the base model as PEFT does."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import IA3Config

from fedhds.errors import UsageError
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.gguf_adapter import write_gguf_adapter

IDS = torch.tensor([[5, 9, 40, 77, 12]])
LAYERS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PHI = LAYERS | {"ffn_up": "mlp.gate_up_proj"}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def apply(file: Path, base: Any, architecture: str) -> None:
    """What llama.cpp computes with the file, put into the base model's weights."""
    reader = GGUFReader(file)
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = float(reader.get_field("adapter.lora.alpha").contents())  # type: ignore[union-attr]
    state = base.state_dict()
    names = sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))
    assert len(tensors) == 2 * len(names)
    for name in names:
        block, layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name).groups()  # type: ignore[union-attr]
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = alpha / a.shape[0] * (b @ a)
        if architecture in ("llama", "mistral") and layer in ("attn_q", "attn_k"):
            # Row 2 i of a head in GGUF is row i of transformers, row 2 i + 1 is row i + size / 2.
            heads = base.config.num_attention_heads if layer == "attn_q" else base.config.num_key_value_heads
            size = delta.shape[0] // heads
            plain = torch.empty_like(delta)
            for head in range(heads):
                for row in range(size // 2):
                    plain[head * size + row] = delta[head * size + 2 * row]
                    plain[head * size + size // 2 + row] = delta[head * size + 2 * row + 1]
            delta = plain
        layers = PHI if architecture == "phi3" else LAYERS
        state[f"model.layers.{block}.{layers[layer]}.weight"] += delta


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("mistral", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}),
        ("qwen2", {"use_rslora": True, "rank_pattern": {"v_proj": 8}}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma3_text", {}),
        ("phi3", {}),
    ],
)
def test_what_llama_cpp_reads_gives_the_logits_of_peft(
    architecture: str, words: dict[str, Any], made: Callable[..., Any], tmp_path: Path
) -> None:
    base, tuned, folder = made(architecture, **words)
    file = tmp_path / "out" / "adapter.gguf"
    write_gguf_adapter(AdapterFolder.open(folder), base.config, file)
    plain = logits(base)
    apply(file, base, architecture)
    expected = logits(tuned)
    assert (expected - plain).abs().max() > 0.05
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)


def test_the_head_of_the_file_is_what_llama_cpp_checks(made: Callable[..., Any], tmp_path: Path) -> None:
    base, _, folder = made("qwen2")
    write_gguf_adapter(AdapterFolder.open(folder), base.config, tmp_path / "adapter.gguf")
    reader = GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name and "GGUF" not in name}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "qwen2"
    assert fields["adapter.type"] == "lora"
    alpha = reader.get_field("adapter.lora.alpha")
    assert alpha is not None
    assert alpha.types[0].name == "FLOAT32"


@pytest.mark.parametrize(
    ("architecture", "words", "problem"),
    [
        ("llama", {"use_dora": True}, "does not compute DoRA"),
        ("llama", {"modules_to_save": ["lm_head"]}, "factors of linear layers alone"),
        ("llama", {"config": IA3Config(task_type="CAUSAL_LM")}, "this is one of IA3"),
        ("gpt_neox", {}, "gpt_neox"),
    ],
)
def test_what_gguf_cannot_say_is_refused_with_the_way_out(
    architecture: str, words: dict[str, Any], problem: str, made: Callable[..., Any], tmp_path: Path
) -> None:
    base, _, folder = made(architecture, **words)
    with pytest.raises(UsageError, match=rf"{problem}.*--format merged.*convert_hf_to_gguf\.py"):
        write_gguf_adapter(AdapterFolder.open(folder), base.config, tmp_path / "out" / "adapter.gguf")
    assert not (tmp_path / "out").exists()


def test_an_output_layer_that_is_the_input_embedding_is_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    base, _, folder = made("llama", target_modules=["lm_head"])
    base.config.tie_word_embeddings = True
    with pytest.raises(UsageError, match="the output layer is adapted"):
        write_gguf_adapter(AdapterFolder.open(folder), base.config, tmp_path / "adapter.gguf")
