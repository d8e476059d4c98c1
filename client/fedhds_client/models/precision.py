"""In which type a base model's weights are kept and multiplied; adapters and optimizers are always float32."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedhds.errors import ModelError

# Parameters of a model below which auto keeps to float32 on a CPU: it is quick enough, and exact.
_SMALL = 100_000_000


def weight_dtype(name: str, where: torch.device, config: Any) -> torch.dtype:
    """The type that `name` (auto, or a floating type's name) stands for with the model of `config` on `where`.

    auto: bfloat16 where the hardware multiplies it fast, else float32; on a CPU float32 for models below 100 million
    parameters and for encoders. Raises ModelError.
    """
    if name == "auto":
        if where.type == "cuda":
            fast = torch.cuda.is_bf16_supported()
        else:
            fast = cpu_is_fast() and _parameters(config) >= _SMALL
        return torch.bfloat16 if fast else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"{name!r} is not a floating type; use auto, float32, bfloat16 or float16, or 4bit on a GPU")
    return dtype


def cpu_is_fast() -> bool:
    """Whether this CPU has instructions that multiply bfloat16: AMX or avx512_bf16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def four_bit(name: str, where: torch.device, config: Any) -> BitsAndBytesConfig:
    """QLoRA's quantization (Dettmers et al. 2023): 4-bit NormalFloat, its scales quantized as well.

    Raises ModelError where the model `name` cannot be quantized: bitsandbytes' 4-bit products are slow on CPUs.
    """
    if where.type != "cuda":
        raise ModelError("4bit needs a CUDA device, and this site computes on a CPU; use --dtype auto")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantized already; use --dtype auto")
    # transformers annotates none of it.
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def _parameters(config: Any) -> int:
    """Of the causal language model of `config`; 0 for a model that is none."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - the model's own code raises what it likes, and loading will say what is wrong
        return 0
    return sum(parameter.numel() for parameter in model.parameters())
