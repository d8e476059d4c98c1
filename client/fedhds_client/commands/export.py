"""`fedhds export`: hand an adapter on, alone or merged into its base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhds_client.commands.adapter import _ADAPTER_FILES, _check_adapter, _prepare_environment

if TYPE_CHECKING:
    from fedhds_client.models.loading import BaseModel

_GENERATION = "generation_config.json"


def export(
    adapter: Annotated[Path, typer.Option(help="PEFT folder: a checkpoint, or what a site received.")],
    out: Annotated[Path, typer.Option(help="Folder to write; must be empty.")],
    merged: Annotated[bool, typer.Option(help="Merge the adapter into the base model and write the whole.")] = False,
    model: Annotated[str | None, typer.Option(help="Base model, if not what the adapter names.")] = None,
) -> None:
    """Copy an adapter, or merge it into its base model."""
    import shutil

    from fedhds.errors import UsageError

    _check_adapter(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: {out} is not empty; name a new folder")
    if merged:
        _prepare_environment()
        from fedhds_client.models.adapter import InferenceModel
        from fedhds_client.models.loading import load_base_model

        base = load_base_model(model or _base_model_of(adapter), device="cpu")
        _undo_quantization(base)
        # In float32, rounded once to the type that the base model is stored in.
        try:
            whole = InferenceModel.with_adapter(base, adapter).module.merge_and_unload().to(base.stored_dtype)
            _set_ends(whole, adapter / _GENERATION)
        except (AttributeError, NotImplementedError) as error:
            raise UsageError("--merged: PEFT cannot merge this kind of adapter; export it without --merged") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        if merged:
            whole.save_pretrained(out)
            base.tokenizer.save_pretrained(out)
        else:
            for name in (*_ADAPTER_FILES, _GENERATION, "README.md"):
                if (adapter / name).exists():
                    shutil.copyfile(adapter / name, out / name)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {out}: {error.strerror or error}") from error
    typer.echo(f"{'merged model' if merged else 'adapter'}: {out}")


def _set_ends(model: Any, file: Path) -> None:
    """Generation with a merged model also stops where the adapter's answers end. Raises UsageError for a bad file."""
    import json

    from fedhds.errors import UsageError

    if not file.exists():
        return
    try:
        own = json.loads(file.read_text(encoding="utf-8"))["eos_token_id"]
        ends = [int(token) for token in (own if isinstance(own, list) else [own])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--adapter: {file} does not say what ends an answer; write it again or remove it") from error
    earlier = model.generation_config.eos_token_id
    earlier = earlier if isinstance(earlier, list) else [] if earlier is None else [earlier]
    model.generation_config.eos_token_id = list(dict.fromkeys([*ends, *earlier]))


def _undo_quantization(base: BaseModel) -> None:
    """Gives a quantized base model its layers in float32, as it computes with them; raises UsageError."""
    import torch

    from fedhds.errors import UsageError

    if getattr(base.model, "hf_quantizer", None) is None:
        return
    try:
        base.model = base.model.dequantize(dtype=torch.float32)
        # How quantized files are read cannot be turned around to write; without it the architecture's own form is used.
        base.model._weight_conversions = None
    except Exception as error:
        # Quantizers raise what they like where they cannot.
        raise UsageError(
            f"--merged: {base.name} is quantized, and transformers cannot undo it ({type(error).__name__}); name the "
            "model that it was made of with --model, or export the adapter without --merged"
        ) from error


def _base_model_of(folder: Path) -> str:
    import json

    from fedhds.errors import UsageError

    try:
        name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise UsageError(f"--adapter: {folder} does not say which base model it is for; name it with --model")
    return name
