"""`fedhds chat`: through a pipe, and on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fedhds.encoding import shown
from fedhds.errors import UsageError
from fedhds_client.chat import Conversation, _Pieces
from fedhds_client.commands.chat import chat
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.evaluation.generation import generate
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import load_base_model
from tests.support.templates import STRICT, set_template

app = typer.Typer()
app.command()(chat)
WAIT_S = 120
# A question with this word gets a piece of an answer, and no more.
ENDLESS = """
import sys, threading
from fedhds_client import chat
plain = chat.Conversation._generate
def generate(self, prompt, streamer):
    if not any("endless" in turn["content"] for turn in self._turns[-1:]):
        return plain(self, prompt, streamer)
    streamer._show("on and on")
    threading.Event().wait()
chat.Conversation._generate = generate
from fedhds.cli.toolbox import main
main()
"""


@pytest.fixture(scope="module")
def lively(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with larger weights: its answers are not one token again and again."""
    folder = shutil.copytree(llama, tmp_path_factory.mktemp("lively") / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(lively: Path, adapter: Path) -> InferenceModel:
    return InferenceModel.with_adapter(load_base_model(str(lively), device="cpu"), adapter)


def conversation(tuned: InferenceModel, **words: Any) -> Conversation:
    prompter = Prompter(tuned.tokenizer, max_length=tuned.base.max_length)
    settings: dict[str, Any] = {"stop_ids": [9, 2], "max_new_tokens": 12}
    return Conversation(tuned, prompter, **settings | words)


def asked(own: Conversation, question: str) -> str:
    pieces: list[str] = []
    own.answer(question, pieces.append)
    return "".join(pieces)


def test_answers_are_those_of_an_evaluation_and_the_conversation_is_kept(tuned: InferenceModel) -> None:
    own = conversation(tuned, stop_ids=[])
    prompter = Prompter(tuned.tokenizer, max_length=tuned.base.max_length)
    turns: list[dict[str, str]] = []
    for question in ("Say tea.", "And sun?"):
        turns.append({"role": "user", "content": question})
        row = Row(0, "", "", "x", messages=(*turns, {"role": "assistant", "content": "x"}))
        expected = generate(tuned, prompter, [row], 12)[0].text
        assert asked(own, question) == expected
        turns.append({"role": "assistant", "content": expected or "..."})


def test_pieces_come_one_after_the_other_and_an_interrupted_answer_stays(tuned: InferenceModel) -> None:
    own = conversation(tuned, stop_ids=[], max_new_tokens=30)
    whole: list[str] = []
    own.answer("Say tea.", whole.append)
    assert len(whole) > 2
    other = conversation(tuned, stop_ids=[], max_new_tokens=30)
    seen: list[str] = []

    def interrupt(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.answer("Say tea.", interrupt)
    assert seen == whole[:2]
    assert other._turns[-1] == {"role": "assistant", "content": "".join(seen)}
    asked(other, "And now?")


def test_delivered_tokens_end_an_answer(tuned: InferenceModel) -> None:
    prompt = tuned.tokenizer("Say tea.")["input_ids"]

    def tokens(stop_ids: list[int]) -> list[int]:
        pieces = _Pieces(tuned.tokenizer, lambda _: None)
        conversation(tuned, stop_ids=stop_ids, max_new_tokens=20)._generate(prompt, pieces)
        return pieces._ids or []

    whole = tokens([])
    stop = whole[5]
    assert tokens([stop]) == whole[: whole.index(stop) + 1]
    assert len(tokens([stop])) < len(whole)


def test_the_oldest_turns_make_room(tuned: InferenceModel) -> None:
    own = conversation(tuned)
    left_out = []
    for _ in range(4):
        asked(own, "tea " * 30)
        left_out.append(own.left_out)
    assert left_out[0] == 0
    assert left_out[-1] > 0
    assert not own.cut
    asked(own, "tea " * 300)
    assert own.cut


def test_a_temperature_draws(tuned: InferenceModel) -> None:
    answers = {asked(conversation(tuned, stop_ids=[], temperature=5.0), "Say tea.") for _ in range(4)}
    assert len(answers) > 1


def test_a_template_without_a_system_message_refuses_one(llama: Path, tmp_path: Path, tuned: InferenceModel) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(set_template(tmp_path, STRICT))
    with pytest.raises(UsageError, match=r"--system: .*no system role"):
        Conversation(tuned, Prompter(tokenizer, max_length=512), stop_ids=[], system="Be kind.")


def test_lines_of_a_pipe_are_questions(adapter: Path, lively: Path, tuned: InferenceModel) -> None:
    words = ["--adapter", str(adapter), "--model", str(lively), "--max-new-tokens", "12", "--system", "Be kind."]
    result = CliRunner().invoke(app, words, input="Say tea.\n\n" + "sun " * 300 + "\n", catch_exceptions=False)
    assert result.exit_code == 0
    own = conversation(tuned, system="Be kind.")
    first, second = asked(own, "Say tea."), asked(own, ("sun " * 300).strip())
    assert result.stdout == shown(f"{first}\n{second}\n", keep="\n\t")
    assert "[the question is longer than the context of 512 tokens; its middle was left out]" in result.stderr


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fedhds_client.commands.chat; "
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_on_a_terminal_keys_stop_an_answer_and_end(adapter: Path) -> None:
    master, slave = pty.openpty()
    words = [sys.executable, "-c", ENDLESS, "chat", "--adapter", str(adapter), "--max-new-tokens", "3"]
    environment = {**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def own_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        # Of tests that run in a shell's background, the signal is ignored, and so it would be here.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=own_terminal)
    os.close(slave)
    text, changed = bytearray(), threading.Condition()

    def read() -> None:
        # The other end being closed reads as an error.
        with contextlib.suppress(OSError):
            while content := os.read(master, 1 << 16):
                with changed:
                    text.extend(content)
                    changed.notify()

    reader = threading.Thread(target=read)
    reader.start()

    def until(mark: str, count: int = 1) -> None:
        with changed:
            assert changed.wait_for(lambda: text.decode(errors="replace").count(mark) >= count, WAIT_S), text

    try:
        until("> ")
        os.write(master, b"\x03")
        until("Ctrl-D ends", 2)
        until("> ", 2)
        os.write(master, b"endless\n")
        until("on and on")
        os.write(master, b"\x03")
        until("[stopped]")
        until("> ", 3)
        os.write(master, b"Say tea.\n")
        until("> ", 4)
        os.write(master, b"\x04")
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(master)
