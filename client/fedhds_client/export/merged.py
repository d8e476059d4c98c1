"""The adapter merged into its base model, as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedhds.errors import ModelError, UsageError
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import BaseModel, load_base_model


def merged(adapter: AdapterFolder, model: str) -> tuple[Any, Any]:
    """The whole model, in the type that `model` is stored in, and its tokenizer; raises UsageError, ModelError."""
    base = load_base_model(model, device="cpu")
    _undo_quantization(base)
    # In float32, rounded once to the type that the base model is stored in.
    tuned = InferenceModel.with_adapter(base, adapter.path)
    try:
        whole = tuned.merged().to(base.stored_dtype)
    except ModelError as error:
        raise UsageError(f"--format merged: {error}; export it with --format peft") from error
    # Generation with a merged model also stops where the adapter's answers end.
    ends = adapter.stop_ids()
    earlier = whole.generation_config.eos_token_id
    earlier = earlier if isinstance(earlier, list) else [] if earlier is None else [earlier]
    if ends:
        whole.generation_config.eos_token_id = list(dict.fromkeys([*ends, *earlier]))
    return whole, base.tokenizer


def write_merged(adapter: AdapterFolder, model: str, out: Path) -> None:
    """Writes the whole model with its tokenizer; makes `out` only when both are there. Raises OSError, too."""
    whole, tokenizer = merged(adapter, model)
    out.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _undo_quantization(base: BaseModel) -> None:
    """Gives a quantized base model its layers in float32, as it computes with them; raises UsageError."""
    if getattr(base.model, "hf_quantizer", None) is None:
        return
    try:
        base.model = base.model.dequantize(dtype=torch.float32)
        # How quantized files are read cannot be turned around to write; without it the architecture's own form is used.
        base.model._weight_conversions = None
    except Exception as error:
        # Quantizers raise what they like where they cannot.
        raise UsageError(
            f"--format merged: {base.name} is quantized, and transformers cannot undo it ({type(error).__name__}); "
            "name the model that it was made of with --model, or export the adapter with --format peft"
        ) from error
