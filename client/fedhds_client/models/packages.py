"""Which Python package a library's error asks for, when one is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

# How transformers names packages, mostly with the command that installs them.
_NAMED = (
    re.compile(r"pip install (?:-U |--upgrade )?['\"`]?([A-Za-z][\w-]*\w)"),
    re.compile(r"requires the (\w[\w-]*) library"),
    re.compile(r"No module named '([\w]+)"),
)
# It asks for these two in one sentence, whichever it misses.
_EITHER = "sentencepiece or tiktoken"
# Without the one it gives its files to the other, which cannot read them.
_FOR_SENTENCEPIECE = "Error parsing line"


def missing_package(error: BaseException) -> str | None:
    """The package that `error`, or what it came from, asks for; None for another error, or when it is installed."""
    current: BaseException | None = error
    while current is not None:
        text = str(current)
        names = _EITHER.split(" or ") if _EITHER in text else []
        names += ["sentencepiece"] if _FOR_SENTENCEPIECE in text else []
        names += [match[1] for match in (pattern.search(text) for pattern in _NAMED) if match]
        lacking = [name for name in names if not _installed(name)]
        if lacking:
            return " or ".join(dict.fromkeys(lacking))
        current = current.__cause__ or current.__context__
    return None


def _installed(package: str) -> bool:
    """By the name of the package, or of the module in it."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.util.find_spec(package) is not None
    return True
