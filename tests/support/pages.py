"""The repository's Markdown as tests see it: pages, fenced blocks with their marks, shell commands, anchors."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))
_FENCED = re.compile(r"^```(\w*) ?([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'[^\n]*\n.*?^\1$", re.MULTILINE | re.DOTALL)
# Blocks of no language also hold what is no command.
_COMMAND = re.compile(r"(fedhds|make|pip|python|docker|kubectl|export|accelerate)\b")
_KEYWORDS = ("if", "then", "fi", "[", "]", "exec")


@dataclass(frozen=True)
class Block:
    """A fenced block; `marks` are the words `key=value` behind its language, which readers do not see."""

    language: str
    marks: dict[str, str]
    text: str


def read(page: str) -> str:
    """A page's text, by its path below the repository's root."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in its order."""
    found = _FENCED.findall(read(page))
    return [
        Block(language, dict(mark.split("=", 1) for mark in marks.split()), text) for language, marks, text in found
    ]


def commands(page: str) -> list[list[str]]:
    """The simple commands of a page's shell blocks, each as its words; what stands in here-documents is none."""
    lines: list[str] = []
    for block in blocks(page):
        joined = _HERE_DOCUMENT.sub("", block.text).replace("\\\n", " ").splitlines()
        if block.language in ("", "sh"):
            lines += [line for line in joined if block.language or _COMMAND.match(line)]
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|()<>"):
                if command:
                    found.append(command)
                command = []
            elif command or word not in _KEYWORDS:
                command.append(word)
    return found


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return _FENCED.sub("", read(page))


def anchors(page: str) -> set[str]:
    """What links to a page may name behind a #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
