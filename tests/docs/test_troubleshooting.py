"""docs/troubleshooting.md: what it says that programs say is what they say."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.support.pages import ROOT, read

PAGE = "docs/troubleshooting.md"
_SYMPTOMS = [
    message
    for row in re.findall(r"^\| (`.*?) \|", read(PAGE), flags=re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", row)
]


@cache
def texts() -> frozenset[str]:
    """All literal texts of the three packages; of an f-string, what stands between its values."""
    found = set()
    for package in ("common", "server", "client"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    # Log messages have their values marked by the logger's own sign.
                    found |= set(re.split(r"%[sdg]|%\.\df", node.value))
    return frozenset(found)


def test_there_are_symptoms() -> None:
    assert len(_SYMPTOMS) > 50


@pytest.mark.parametrize("message", _SYMPTOMS)
def test_a_symptom_is_what_a_program_says(message: str) -> None:
    for part in message.split("…"):
        assert any(part in text for text in texts()), part


def test_every_page_of_the_runbook_is_named() -> None:
    page = read(PAGE)
    pages = {path.name for path in (ROOT / "docs" / "runbook").glob("*.md")}
    assert {name for name in pages if f"(runbook/{name})" not in page} == set()
