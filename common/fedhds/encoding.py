"""Text whose bytes are not UTF-8: names of files may be so, nothing that travels or is stored may."""

from __future__ import annotations


def not_utf_8(text: str) -> bool:
    """Whether `text` has bytes that are not UTF-8, which Python hands on as surrogates."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def escaped(text: str) -> str:
    """`text` with such bytes written as \\udc80 to \\udcff, as Python's standard error shows them."""
    return text.encode("utf-8", "backslashreplace").decode()
