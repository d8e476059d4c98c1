"""`fedhds evaluate` and `fedhds export`: measure an adapter, and hand it on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fedhds_client.models.loading import BaseModel

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_GENERATION = "generation_config.json"


def evaluate(
    model: Annotated[str, typer.Option(help="Base model: a path or a hub id.")],
    data: Annotated[Path, typer.Option(help="Rows to measure on.")],
    adapter: Annotated[
        Path | None, typer.Option(help="PEFT folder; without it only the base model is measured.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=16, help="Longest row in tokens.")] = 1024,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens generated per row.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 16,
    prompt_format: Annotated[Literal["auto", "chat", "alpaca"], typer.Option(help="As in the run.")] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    skip_bad_rows: Annotated[bool, typer.Option(help="Leave out rows that cannot be used.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure loss and Rouge-L of a base model, and of an adapter on it."""
    import json as codec

    from fedhds.evaluation import label_of

    _prepare_environment()
    from rich.console import Console
    from rich.table import Table

    from fedhds_client.computation import Control
    from fedhds_client.data.judging import judge
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.evaluation import METRICS
    from fedhds_client.evaluation.evaluate import evaluate as measure
    from fedhds_client.models.adapter import InferenceModel
    from fedhds_client.models.loading import load_base_model

    if adapter:
        _check_adapter(adapter)
    with Shard.open(data, skip_bad_rows=skip_bad_rows) as shard:
        base = load_base_model(model, device=device)
        length = min(max_length, base.max_length)
        prompter = Prompter(base.tokenizer, max_length=length, prompt_format=prompt_format, model=base.model)
        judge(shard, prompter, skip_bad_rows=skip_bad_rows, operator="you", control=Control())

        def means_of(candidate: InferenceModel) -> dict[str, float]:
            sums = measure(candidate, shard, prompter, max_new_tokens=max_new_tokens, batch_size=batch_size)
            return {"rows": sums.rows, **sums.means}

        # The base model first: PEFT puts the adapter's layers into it.
        results = {"base": means_of(InferenceModel(base, base.model))}
        if adapter:
            results["adapter"] = means_of(InferenceModel.with_adapter(base, adapter))
    if json:
        typer.echo(codec.dumps(results))
        return
    table = Table("", "rows", *map(label_of, METRICS))
    for name, line in results.items():
        table.add_row(name, str(line["rows"]), *(f"{line[metric]:.4f}" for metric in METRICS))
    Console().print(table)


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


def _check_adapter(folder: Path) -> None:
    from fedhds.errors import UsageError

    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"--adapter: {folder} is no adapter folder, it lacks {' and '.join(missing)}")


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


def _prepare_environment() -> None:
    """Before libraries are imported, which read it once. Raises UsageError for a user without a home."""
    import os

    from fedhds_client.home import require_home

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    require_home()
