"""`fedhds inspect-data`: what a run will see in a file of rows, shown to the people whose data it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fedhds_client.commands.adapter import _prepare_environment

if TYPE_CHECKING:
    from rich.console import Console

    from fedhds_client.data.inspection import Inspection, RenderedRow

Styled = str | tuple[str, str]
"""Text, or text and its style."""

_BAR = 40
_MAX_REASONS = 20
_TRAINED, _END = "green", "black on yellow"


def inspect_data(
    file: Annotated[Path, typer.Argument(help="Rows, as for --data and --eval-data of a site.")],
    model: Annotated[str, typer.Option(help="The run's base model: a path or a hub id. Its weights are not loaded.")],
    model_revision: Annotated[str, typer.Option(help="Revision of a hub model.")] = "",
    max_length: Annotated[int, typer.Option(min=16, help="The run's longest row in tokens.")] = 1024,
    prompt_format: Annotated[Literal["auto", "chat", "alpaca"], typer.Option(help="The run's prompt format.")] = "auto",
    rows: Annotated[int, typer.Option(min=0, help="How many rows are shown as the run sees them.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a run will see in FILE: its format, rows that cannot be used, lengths in tokens, and the first rows
    with what is trained. Text of rows is printed here and sent nowhere. Exit status: 0, 1 when no row can be used,
    2 for a mistake.
    """
    _prepare_environment()
    from rich.console import Console

    from fedhds.errors import DataError
    from fedhds_client.data.inspection import inspect
    from fedhds_client.models.loading import load_tokenizer

    # Before the model, which may have to be fetched.
    if not file.is_file():
        raise DataError(file, "is a folder; name a file in it" if file.is_dir() else "there is no such file")
    tokenizer, longest = load_tokenizer(model, revision=model_revision)
    length = min(max_length, longest)
    with Console(stderr=True).status("reading rows") as status:

        def show(count: int) -> None:
            if count % 500 == 0:
                status.update(f"reading rows: {count}")

        result = inspect(file, tokenizer, max_length=length, prompt_format=prompt_format, rows=rows, progress=show)
    if longest < max_length:
        result.notes.append(f"the model takes rows of up to {longest} tokens, whatever --max-length says")
    if json:
        import json as codec

        typer.echo(codec.dumps(_report(file, model, length, result)))
    else:
        _print(Console(highlight=False, soft_wrap=True), file, model, length, result)
    if not result.usable:
        raise typer.Exit(1)


def _report(file: Path, model: str, length: int, result: Inspection) -> dict[str, Any]:
    from fedhds.encoding import escaped
    from fedhds_client.data.inspection import histogram, median

    lengths = result.lengths
    return {
        "file": escaped(str(file)),
        "model": model,
        "prompt_format": result.prompt_format,
        "max_length": length,
        "notes": result.notes,
        "rows": result.usable + result.refused,
        "usable": result.usable,
        "formats": dict(result.formats),
        "refused": result.refused,
        "reasons": [{"reason": reason, "rows": count} for reason, count in result.reasons.most_common()],
        "refusals": [{"line": line, "reason": reason} for line, reason in result.refusals],
        "usable_with_alpaca": result.usable_with_alpaca,
        "truncated": result.truncated,
        "cut_answers": result.cut_answers,
        "tokens": {
            "total": sum(lengths),
            "shortest": min(lengths, default=None),
            "median": median(lengths),
            "longest": max(lengths, default=None),
            "histogram": [
                {"from": first, "to": last, "rows": count} for first, last, count in histogram(lengths, length)
            ],
        },
        "rendered": [asdict(row) for row in result.rendered],
    }


def _print(console: Console, file: Path, model: str, length: int, result: Inspection) -> None:
    from rich.text import Text

    from fedhds.encoding import shown

    def say(*parts: Styled) -> None:
        text = Text()
        for part in parts:
            words, style = (part, "") if isinstance(part, str) else part
            # Neither a file's name nor a row is markup, or steers the terminal.
            text.append(shown(words, keep="\n\t"), style)
        console.print(text)

    how = {"chat": "the model's chat template", "alpaca": "Alpaca's prompt format"}[result.prompt_format]
    say(f"{file} in a run with {model}: {how}, rows of up to {length} tokens")
    for note in result.notes:
        say(f"note: {note}")
    formats = ", ".join(f"{count} {name}" for name, count in result.formats.most_common())
    say()
    say(f"{result.usable + result.refused:>8} rows")
    say(f"{result.usable:>8} usable", f": {formats}" * bool(formats))
    say(
        f"{result.refused:>8} refused",
        ": a site starts only with --skip-bad-rows, which leaves them out" * bool(result.refused),
    )
    cut = f": the middle of what is before the answer is left out; {result.cut_answers} lose a part of the answer, too"
    say(f"{result.truncated:>8} truncated", cut * bool(result.truncated))
    if result.refused:
        say("\nRefused rows by reason")
        for reason, count in result.reasons.most_common(_MAX_REASONS):
            say(f"{count:>8} {reason}")
        if len(result.reasons) > _MAX_REASONS:
            say(f"         and {len(result.reasons) - _MAX_REASONS} more reasons")
        say("\nFirst refused rows")
        for line, reason in result.refusals:
            say(f"line {line}: {reason}")
        if result.usable_with_alpaca:
            cure = f"--prompt-format alpaca takes {result.usable_with_alpaca} of them; the run's operator sets it"
            say(f"\n{cure}")
    if result.usable:
        _print_lengths(say, "#" if console.options.ascii_only else "\u2588", length, result)
    if result.rendered:
        _print_rows(say, bool(console.color_system) and not console.no_color, result.rendered)


def _print_lengths(say: Callable[..., None], block: str, length: int, result: Inspection) -> None:
    from fedhds_client.data.inspection import histogram, median

    bins = histogram(result.lengths, length)
    most = max(count for _, _, count in bins)
    extent = f"{min(result.lengths)} to {max(result.lengths)}, median {median(result.lengths)}"
    say(f"\nTokens in a row, before it is cut: {extent}")
    mark = f"{'-' * 16} longest row {length} {'-' * 16}"
    for first, last, count in bins:
        # A bin with a row in it does not look empty.
        bar = block * -(-_BAR * count // most)
        say(f"{f'{first} to {last}':>16} {bar}{' ' * bool(bar)}{count}")
        if last == length:
            say(mark)
    if bins[-1][1] < length:
        say(mark)


def _print_rows(say: Callable[..., None], colored: bool, rows: list[RenderedRow]) -> None:
    legend: tuple[Styled, ...] = ("[[what is trained]], {{the token that ends an answer}}",)
    if colored:
        legend = ("what is trained", _TRAINED), ", ", ("the token that ends an answer", _END)
    say("\nRows as the run sees them: ", *legend)
    for row in rows:
        cut = f", {row.left_out} more are cut" * bool(row.left_out)
        unended = "; no token ends the answer" * (not row.ended)
        say(f"\nline {row.line}: {row.tokens} tokens{cut}; {row.loss_tokens} are trained{unended}")
        say(*(_colored(row) if colored else _marked(row)))


def _colored(row: RenderedRow) -> Iterator[Styled]:
    for part in row.parts:
        yield part.text, _END if part.end else _TRAINED if part.loss else ""


def _marked(row: RenderedRow) -> Iterator[Styled]:
    trained = False
    for part in row.parts:
        if part.loss != trained:
            yield "[[" if part.loss else "]]"
        yield f"{{{{{part.text}}}}}" if part.end else part.text
        trained = part.loss
    yield "]]" * trained
