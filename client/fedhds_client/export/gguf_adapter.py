"""A LoRA adapter as a GGUF file that llama.cpp takes with --lora.

What llama.cpp reads (src/llama-adapter.cpp): `general.type` adapter, `general.architecture` as in the base model's
file, `adapter.type` lora, `adapter.lora.alpha` as a 32-bit float, and for each adapted tensor of the base model
NAME.lora_a (rank, in) and NAME.lora_b (out, rank). It scales with alpha / rank, whatever PEFT does, so other scales go
into B. Llama's query and key rows stand in another order there: each head's two halves of rotary pairs take turns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhds.errors import UsageError
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.lora import factors, modules_of, tensor_names, variants_of

# model_type of transformers, to gguf's architecture, and whether it has Llama's order of query and key rows.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
    "gemma": ("GEMMA", False),
    "gemma2": ("GEMMA2", False),
    "gemma3_text": ("GEMMA3", False),
    "phi3": ("PHI3", False),
}
WAY_OUT = "export it with --format merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def check_gguf(adapter: AdapterFolder, config: Any) -> list[str]:
    """What keeps the adapter from becoming a GGUF adapter, one line each; `config` is the base model's."""
    if adapter.kind != "LORA":
        return [f"llama.cpp loads LoRA adapters, and this is one of {adapter.kind or 'an unknown kind'}"]
    found = [f"llama.cpp does not compute {name}" for name in variants_of(adapter.config)]
    if config.model_type not in ARCHITECTURES:
        found.append(f"how a {config.model_type} model's tensors become GGUF is not known here")
        return found
    modules, others = modules_of(tensor_names(adapter))
    if others:
        found.append(f"llama.cpp's adapters have factors of linear layers alone, this one has {others[0]}, too")
    if not modules:
        found.append("the adapter has no factors")
    known = _name_map(config)
    for module in modules:
        if known.get_name(f"{module}.weight", try_suffixes=(".weight",)) is None:
            found.append(f"GGUF has no name for the layer {module}")
            break
    if "lm_head" in modules and config.tie_word_embeddings:
        found.append("the output layer is adapted, which in llama.cpp is the input embedding of this base model")
    return found


def write_gguf_adapter(adapter: AdapterFolder, config: Any, file: Path) -> None:
    """Writes the adapter in float32; raises UsageError for what GGUF or llama.cpp cannot take, with what to do.

    `config` is the base model's configuration, as transformers reads it.
    """
    import gguf

    problems = check_gguf(adapter, config)
    if problems:
        raise UsageError(f"--format gguf: {problems[0]}; {WAY_OUT}")
    name, permuted = ARCHITECTURES[config.model_type]
    known = _name_map(config)
    # Zero means to llama.cpp that there is no scale.
    alpha = float(adapter.config.get("lora_alpha", 8)) or 1.0
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]])
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for pair in factors(adapter):
            rank = pair.a.shape[0]
            b = pair.b * np.float32(pair.scale * rank / alpha)
            if permuted and pair.module.endswith((".q_proj", ".k_proj")):
                query = pair.module.endswith(".q_proj")
                heads = config.num_attention_heads if query else config.num_key_value_heads
                b = permute(b, heads)
            target = known.get_name(f"{pair.module}.weight", try_suffixes=(".weight",))
            writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(pair.a))
            writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def permute(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows (heads * 2 * half, ...) in llama.cpp's order: within each head, row i of either half stand together."""
    parts = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return parts.swapaxes(1, 2).reshape(rows.shape)


def _name_map(config: Any) -> Any:
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[config.model_type][0]], config.num_hidden_layers)
