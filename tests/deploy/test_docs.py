"""docs/compose.md and docs/kubernetes.md: their commands name what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from fedhds import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("compose.md", "kubernetes.md")


def text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", text(page), flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)", text(page))
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_and_make_targets_of_commands_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in commands(page):
        for word in words:
            assert not word.startswith("deploy/") or (ROOT / word).exists(), word
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:.*##", makefile, flags=re.MULTILINE), words


def test_commands_of_the_toolbox_are_valid() -> None:
    toolbox: Any = typer.main.get_command(cli.app)
    found = [words for page in PAGES for words in commands(page) if words[0] == "fedhds"]
    assert found
    for words in found:
        command, arguments = toolbox, words[1:]
        while hasattr(command, "commands"):
            command, arguments = command.get_command(typer.Context(command), arguments[0]), arguments[1:]
        command.make_parser(typer.Context(command)).parse_args(list(arguments))
