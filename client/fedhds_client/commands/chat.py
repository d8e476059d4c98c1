"""`fedhds chat`: talk with a tuned model in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedhds_client.chat import Conversation


def chat(
    adapter: Annotated[Path, typer.Option(help="PEFT folder: a checkpoint, or what a site received.")],
    model: Annotated[str | None, typer.Option(help="Base model, if not what the adapter names.")] = None,
    system: Annotated[str, typer.Option(help="System message, before the first question.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(min=0, max=10, help="Draw tokens at this temperature; 0 takes the likeliest.")
    ] = 0.0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
) -> None:
    """Talk with a tuned model, one line a question. Ctrl-C stops an answer, Ctrl-D ends."""
    import sys

    from fedhds_client.commands.adapter import _prepare_environment
    from fedhds_client.export.adapter_folder import AdapterFolder

    folder = AdapterFolder.open(adapter)
    name, stop_ids = folder.base_model(model), folder.stop_ids()
    _prepare_environment()
    from fedhds_client.chat import Conversation
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.models.adapter import InferenceModel
    from fedhds_client.models.loading import load_base_model

    base = load_base_model(name, device=device)
    tuned = InferenceModel.with_adapter(base, adapter)
    prompter = Prompter(
        base.tokenizer, max_length=tuned.max_length, prompt_format=folder.prompt_format(), model=base.model
    )
    conversation = Conversation(
        tuned,
        prompter,
        stop_ids=stop_ids,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    terminal = sys.stdin.isatty()
    if terminal:
        typer.echo(f"{name} with {adapter}. Ctrl-C stops an answer, Ctrl-D ends.", err=True)
    for question in _typed() if terminal else sys.stdin:
        if question.strip():
            _answer(conversation, question.strip(), tuned.max_length, terminal)


def _typed() -> Iterator[str]:
    """Lines from the terminal, until Ctrl-D."""
    import contextlib

    with contextlib.suppress(ImportError):
        # Gives input() its editing and history.
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            typer.echo("\nCtrl-D ends", err=True)


def _answer(conversation: Conversation, question: str, context: int, terminal: bool) -> None:
    import sys

    from fedhds.encoding import shown
    from fedhds.errors import UsageError

    def show(text: str) -> None:
        # What a model says does not steer the terminal.
        sys.stdout.write(shown(text, keep="\n\t"))
        sys.stdout.flush()

    try:
        conversation.answer(question, show)
    except KeyboardInterrupt:
        if not terminal:
            raise
        show(" [stopped]")
    except UsageError as error:
        typer.echo(str(error), err=True)
        return
    show("\n")
    note = ""
    if conversation.cut:
        note = f"the question is longer than the context of {context} tokens; its middle was left out"
    elif conversation.left_out:
        note = f"the context of {context} tokens is full; the first {conversation.left_out} turns were left out"
    if note:
        typer.echo(f"[{note}]", err=True)
