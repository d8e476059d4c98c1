"""`fedhds evaluate`: measure a base model, and an adapter on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from fedhds_client.evaluation import EvaluationSums

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
    """Measure loss, Rouge-L and length of answers of a base model, and of an adapter on it, by category and overall.

    A row's category is its field "category" or "task".
    """
    import json as codec

    _prepare_environment()
    from fedhds_client.computation import Control
    from fedhds_client.data.judging import judge
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.evaluation import EvaluationSums
    from fedhds_client.evaluation.evaluate import evaluate as measure
    from fedhds_client.models.adapter import InferenceModel, virtual_tokens_of
    from fedhds_client.models.loading import load_base_model

    if adapter:
        _check_adapter(adapter)
    with Shard.open(data, skip_bad_rows=skip_bad_rows) as shard:
        base = load_base_model(model, device=device)
        # The same rows for both.
        length = min(max_length, base.max_length - (virtual_tokens_of(adapter) if adapter else 0))
        prompter = Prompter(base.tokenizer, max_length=length, prompt_format=prompt_format, model=base.model)
        judge(shard, prompter, skip_bad_rows=skip_bad_rows, operator="you", control=Control())

        categories: dict[str, list[int]] = {}
        for row in shard:
            categories.setdefault(row.category or "none", []).append(row.id)

        def scores_of(candidate: InferenceModel) -> dict[str, Any]:
            parts = {
                category: measure(
                    candidate, shard, prompter, rows=rows, max_new_tokens=max_new_tokens, batch_size=batch_size
                )
                for category, rows in sorted(categories.items())
            }
            whole = sum(parts.values(), EvaluationSums())
            return {**_scores(whole), "categories": {name: _scores(part) for name, part in parts.items()}}

        # The base model first: PEFT puts the adapter's layers into it.
        results = {"base": scores_of(InferenceModel(base, base.model))}
        if adapter:
            results["adapter"] = scores_of(InferenceModel.with_adapter(base, adapter))
    if json:
        typer.echo(codec.dumps(results))
        return
    _print_table(results)


def _scores(sums: EvaluationSums) -> dict[str, Any]:
    return {"rows": sums.rows, **sums.means}


def _print_table(results: dict[str, dict[str, Any]]) -> None:
    """A line for each category and model, and at the end those over all rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedhds.evaluation import label_of
    from fedhds_client.evaluation import METRICS

    console = Console()
    if not console.is_terminal:
        # Rich assumes 80 columns there, which breaks the table's lines.
        console = Console(width=max(console.width, 120))
    table = Table("category", "", "rows", *map(label_of, METRICS))
    names = list(results["base"]["categories"])
    for category in (*(names if len(names) > 1 else ()), None):
        for at, (model, scores) in enumerate(results.items()):
            line = scores if category is None else scores["categories"][category]
            values = [f"{line[metric]:.4f}" for metric in METRICS]
            table.add_row(Text("" if at else category or "all rows"), model, str(line["rows"]), *values)
        table.add_section()
    console.print(table)


def _check_adapter(folder: Path) -> None:
    from fedhds.errors import UsageError

    missing = [name for name in _ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"--adapter: {folder} is no adapter folder, it lacks {' and '.join(missing)}")


def _prepare_environment() -> None:
    """Before libraries are imported, which read it once. Raises UsageError for a user without a home."""
    import os

    from fedhds_client.home import require_home

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    require_home()
