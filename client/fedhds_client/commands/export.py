"""`fedhds export`: hand an adapter on, in the form that another program loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedhds_client.export.adapter_folder import AdapterFolder

Format = Literal["peft", "merged", "gguf", "ollama"]


def export(
    adapter: Annotated[Path, typer.Option(help="PEFT folder: a checkpoint, or what a site received.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; must be empty.")] = None,
    format: Annotated[
        Format,
        typer.Option(
            help="peft: a copy. merged: the base model with the adapter in it. gguf: the adapter for llama.cpp. "
            "ollama: the same with a Modelfile."
        ),
    ] = "peft",
    model: Annotated[str | None, typer.Option(help="Base model, if not what the adapter names.")] = None,
    check: Annotated[
        Literal["vllm", "llama.cpp", "ollama"] | None,
        typer.Option(help="Say first what this program would not load; then exit with 1 and write nothing."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Upload to this repository of the hub, with the token of HF_TOKEN or `hf auth login`."
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that everybody can read.")] = False,
) -> None:
    """Write an adapter in the form that another program loads, check that it would load, or upload it."""
    import tempfile

    from fedhds.errors import UsageError
    from fedhds_client.commands.adapter import _prepare_environment
    from fedhds_client.export.adapter_folder import AdapterFolder

    folder = AdapterFolder.open(adapter)
    if out is None and check is None and push_to_hub is None:
        raise UsageError("--out: name a folder to write, or give --check or --push-to-hub")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out: {out} is not empty; name a new folder")
    _prepare_environment()
    if check is not None:
        _check(folder, check, folder.base_model(model))
    if out is not None:
        _write(folder, format, model, out)
        typer.echo(f"{format}: {out}")
    if push_to_hub is not None:
        from fedhds_client.export.hub import push

        with tempfile.TemporaryDirectory() as scratch:
            if out is None:
                _write(folder, format, model, Path(scratch))
            typer.echo(f"uploaded: {push(out or Path(scratch), push_to_hub, public=public)}")


def _check(folder: AdapterFolder, loader: str, base_model: str) -> None:
    """Prints what the loader would stumble over; exits with 1 when it would not load."""
    from fedhds_client.export.loaders import LOADERS
    from fedhds_client.models.loading import load_config

    findings = LOADERS[loader](folder, load_config(base_model))
    for finding in findings:
        typer.echo(f"{'would not load' if finding.blocks else 'note'}: {finding}")
    if any(finding.blocks for finding in findings):
        raise typer.Exit(1)
    typer.echo(f"{loader} loads {folder.path}, as far as its rules are known here")


def _write(folder: AdapterFolder, format: Format, model: str | None, out: Path) -> None:
    import shutil

    from fedhds.errors import UsageError

    try:
        if format == "peft":
            out.mkdir(parents=True, exist_ok=True)
            for file in folder.files:
                shutil.copyfile(file, out / file.name)
        elif format == "merged":
            from fedhds_client.export.merged import write_merged

            write_merged(folder, folder.base_model(model), out)
        else:
            _write_gguf(folder, format, folder.base_model(model), out)
    except OSError as error:
        raise UsageError(f"--out: cannot write to {out}: {error.strerror or error}") from error


def _write_gguf(folder: AdapterFolder, format: Format, base_model: str, out: Path) -> None:
    from importlib.util import find_spec

    from fedhds.errors import UsageError
    from fedhds_client.models.loading import load_config, load_tokenizer, local_folder

    if find_spec("gguf") is None:
        raise UsageError(f"--format {format} needs pip install 'fedhds[export]'")
    config = load_config(base_model)
    if format == "gguf":
        from fedhds_client.export.gguf_adapter import write_gguf_adapter

        write_gguf_adapter(folder, config, out / "adapter.gguf")
        return
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.export.ollama import write_ollama

    tokenizer, longest = load_tokenizer(base_model)
    prompter = Prompter(tokenizer, max_length=longest, prompt_format=folder.prompt_format())
    for note in write_ollama(folder, config, tokenizer, prompter, local_folder(base_model), out):
        typer.echo(f"note: {note}")
