"""Text that is not fit to travel, to be stored or to be shown: bytes that are not UTF-8, characters that steer."""

from __future__ import annotations

MAX_TEXT = 500
"""Characters of another party's words that are shown."""


def not_utf_8(text: str) -> bool:
    """Whether `text` has bytes that are not UTF-8, which Python hands on as surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def escaped(text: str) -> str:
    """`text` with such bytes written as \\udc80 to \\udcff, as Python's standard error shows them."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(text: str, *, keep: str = "") -> str:
    """`text` with a space for every character that could steer a terminal or forge a line of a log.

    Those are control characters, line ends and marks of writing direction, but for those in `keep`; what is not UTF-8
    stays: what writes it escapes it.
    """
    return "".join(
        character if character.isprintable() or character in keep or "\ud800" <= character <= "\udfff" else " "
        for character in text
    )


def printable(text: str, *, limit: int = MAX_TEXT, keep: str = "") -> str:
    """Another party's words, cut to `limit` characters, in a form that harms neither a log nor a terminal.

    Spaces take the place of control characters, line ends and marks of writing direction, but for those in `keep`.
    """
    return "".join(character if character.isprintable() or character in keep else " " for character in text[:limit])
