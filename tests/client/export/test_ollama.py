"""A Modelfile asks as the run asked: its template gives the text of the chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest

from fedhds_client.data.prompts import Prompter
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.export.ollama import Frame, frame_of, write_ollama
from fedhds_client.models.loading import load_tokenizer
from tests.support.templates import CHAT, STRICT, set_template
from tests.support.tiny import make_model

Turns = Sequence[dict[str, str]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Says who it is where nobody else does, as Qwen's.
QWEN = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are it.<|im_end|>\n' }}{% endif %}" + CHATML
# BOS first, other names, and a system message within the first question, as Gemma's.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (first if loop.first else '') + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# Earlier answers are shortened.
FORGETFUL = CHAT.replace("m['content']", "m['content'][:2 if not loop.last else 99]")
QUESTION, ANSWER = {"role": "user", "content": "Why {{ x }}?"}, {"role": "assistant", "content": "So."}
SYSTEM = {"role": "system", "content": "Be kind."}


def go_executes(template: str, turns: Turns) -> str:
    """What Go makes of a template, in the part of its language that is used."""
    words = {
        "if .System": "{% if system %}",
        "else": "{% else %}",
        "end": "{% END %}",
        "range .Messages": "{% for m in turns %}",
        'if eq .Role "user"': "{% if m.role == 'user' %}",
        'else if eq .Role "assistant"': "{% elif m.role == 'assistant' %}",
        ".System": "{{ system }}",
        ".Content": "{{ m.content }}",
    }
    text = re.sub(r"{{ (.*?) }}", lambda match: words[match[1]], template)
    opened: list[str] = []
    for part in re.findall(r"{% (if|for|END)\b", text):
        if part == "END":
            text = text.replace("{% END %}", f"{{% end{opened.pop()} %}}", 1)
        else:
            opened.append(part)
    system = next((turn["content"] for turn in turns if turn["role"] == "system"), "")
    environment = jinja2.Environment(keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text).render(system=system, turns=turns)


def prompter(folder: Path, template: str, prompt_format: Any = "auto") -> tuple[Any, Prompter]:
    make_model(folder)
    if template:
        set_template(folder, template)
    tokenizer, longest = load_tokenizer(str(folder))
    return tokenizer, Prompter(tokenizer, max_length=longest, prompt_format=prompt_format)


@pytest.mark.parametrize("template", [CHATML, CHAT, QWEN, GEMMA, STRICT, ""])
def test_the_template_asks_as_the_run_asked(template: str, tmp_path: Path) -> None:
    _, own = prompter(tmp_path, template)
    frame = frame_of(own.asked)
    assert frame is not None
    assert (frame.system is None) == (template == STRICT)
    talks: list[Turns] = [[QUESTION], [QUESTION, ANSWER, QUESTION]]
    if frame.system:
        talks += [[SYSTEM, *talk] for talk in talks]
    for talk in talks:
        asked = own.asked(talk)
        assert go_executes(frame.go(""), talk) == asked
        # Ollama puts this token first.
        assert go_executes(frame.go("<s>"), talk) == asked.removeprefix("<s>")


def test_what_is_no_frame_is_not_taken_for_one(tmp_path: Path) -> None:
    _, own = prompter(tmp_path, FORGETFUL)
    assert frame_of(own.asked) is None


def test_text_of_a_template_that_go_would_read_is_not_written() -> None:
    assert frame_of(lambda turns: "{{ hm }}" + "".join(turn["content"] + "|" for turn in turns)) is None
    frame = frame_of(lambda turns: ">" + "".join(turn["content"] + "|" for turn in turns))
    assert frame == Frame(">", "|", "|", (">", "|"))


@pytest.mark.parametrize("template", [CHATML, FORGETFUL])
def test_the_folder_for_ollama(template: str, made: Callable[..., Any], tmp_path: Path) -> None:
    base, _, folder = made("llama")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    tokenizer, own = prompter(tmp_path / "tokenizer", template)
    out = tmp_path / "out"
    where = str(tmp_path / "base")
    notes = write_ollama(AdapterFolder.open(folder), base.config, tokenizer, own, where, out)
    text = (out / "Modelfile").read_text()
    assert {file.name for file in out.iterdir()} == {"Modelfile", "adapter.gguf"}
    assert text.startswith(f"FROM {where}\nADAPTER ./adapter.gguf\n")
    assert text.endswith('PARAMETER stop "</s>"\nPARAMETER stop "<s>"\n')
    assert ('TEMPLATE """' in text) == (template == CHATML)
    assert bool(notes) == (template == FORGETFUL)
    assert "SYSTEM" not in text
    named = write_ollama(AdapterFolder.open(folder), base.config, tokenizer, own, "org/name", tmp_path / "other")
    assert any("FROM names org/name" in note for note in named)
