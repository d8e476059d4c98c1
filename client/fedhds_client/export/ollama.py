"""A folder that `ollama create` takes: the adapter as GGUF, and a Modelfile with the prompt format that was trained.

Ollama's templates are Go's. What the base model's chat template writes around the texts of a conversation is found by
rendering conversations of marks, and counts only when it gives a longer one, too, exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Prompter
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.gguf_adapter import write_gguf_adapter

Turns = list[dict[str, str]]
# Texts that no template has a reason to change.
_SYSTEM, *_TEXTS = (f"\ue004{name}\ue005" for name in ("system", *"abcde"))


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the texts of a conversation of user and assistant in turn."""

    before: str
    """Before the first question."""
    ask: str
    """Behind every question."""
    end: str
    """Behind every answer that another question follows."""
    system: tuple[str, str] | None
    """Around a system message, in place of `before`; None where it has no place of its own."""

    def go(self, bos: str) -> str:
        """As Ollama renders it; it puts the token `bos` first by itself."""
        opening = self.before.removeprefix(bos)
        if self.system:
            first, second = self.system[0].removeprefix(bos), self.system[1]
            opening = f"{{{{ if .System }}}}{first}{{{{ .System }}}}{second}{{{{ else }}}}{opening}"
            opening += "{{ end }}"
        question = f'{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{self.ask}'
        answer = f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.end}{{{{ end }}}}'
        return f"{opening}{{{{ range .Messages }}}}{question}{answer}{{{{ end }}}}"


def frame_of(asked: Callable[[Turns], str]) -> Frame | None:
    """The frame behind `asked`, which renders a conversation up to the answer; None where there is no such frame."""
    try:
        text = asked(_turns(3))
        before, first, rest = text.partition(_TEXTS[0])
        ask, second, rest = rest.partition(_TEXTS[1])
        end, third, last = rest.partition(_TEXTS[2])
        pieces = before, ask, end
        if not (first and second and third) or last != ask or any("{{" in piece or '"""' in piece for piece in pieces):
            return None
        if asked(_turns(1)) != before + _TEXTS[0] + ask or asked(_turns(5)) != _joined(pieces):
            return None
    except BadRow:
        return None
    return Frame(before, ask, end, _system(asked, ask))


def write_ollama(
    adapter: AdapterFolder, config: Any, tokenizer: Any, prompter: Prompter, base: str, out: Path
) -> list[str]:
    """Writes `Modelfile` and `adapter.gguf`; returns what a person still has to do. Raises UsageError, OSError.

    `base` is what FROM names: a folder with the base model, or its name.
    """
    write_gguf_adapter(adapter, config, out / "adapter.gguf")
    notes = []
    lines = [f"FROM {base}", "ADAPTER ./adapter.gguf"]
    if not Path(base).is_dir():
        notes.append(f"FROM names {base}: write there what this base model is called in Ollama, or its folder")
    frame = frame_of(prompter.asked)
    if frame is None:
        notes.append(
            "TEMPLATE is left out: the chat template does more than to frame the texts of a conversation; write it "
            "yourself, or Ollama asks with the base model's own"
        )
    else:
        lines.append(f'TEMPLATE """{frame.go(tokenizer.bos_token or "")}"""')
        if frame.system is None:
            notes.append("the prompt format has no place for a system message; SYSTEM has no effect")
    stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in adapter.stop_ids() or prompter.stop_ids]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop.strip() and '"' not in stop]
    (out / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def _turns(count: int) -> Turns:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(_TEXTS[:count])]


def _joined(pieces: tuple[str, str, str]) -> str:
    before, ask, end = pieces
    return before + "".join(text + (end if index % 2 else ask) for index, text in enumerate(_TEXTS))


def _system(asked: Callable[[Turns], str], ask: str) -> tuple[str, str] | None:
    try:
        text = asked([{"role": "system", "content": _SYSTEM}, *_turns(1)])
    except BadRow:
        return None
    opening, system, rest = text.partition(_SYSTEM)
    between, _, behind = rest.partition(_TEXTS[0])
    whole = system and behind == ask and not any("{{" in part or '"""' in part for part in (opening, between))
    return (opening, between) if whole else None
