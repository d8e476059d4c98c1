"""The error of a row that cannot be used."""

from __future__ import annotations


class BadRow(ValueError):
    """A row that cannot be used; the text names keys and types, never values: it may end up in a log."""


def kind_of(value: object) -> str:
    """The kind of a JSON value, in words for a BadRow."""
    names = {
        type(None): "missing",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "text" if isinstance(value, str) else type(value).__name__)
