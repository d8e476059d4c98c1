"""The user's home, which torch, the hub, NLTK and numba look for; a container's user may be a number without one."""

from __future__ import annotations

import os
from pathlib import Path

from fedhds.errors import UsageError


def has_home() -> bool:
    """Whether $HOME or the user's account names a home."""
    return os.path.expanduser("~") != "~"


def make_home(folder: Path) -> None:
    """Makes `folder` the home of this process if its user has none; if it has one that is read-only, numba's cache.

    The hub's cache in a home that cannot be written may be filled, and numba fails without one that it can write.
    """
    if not has_home():
        os.environ["HOME"] = str(folder.absolute())
    elif not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("NUMBA_CACHE_DIR", str(folder.absolute() / "numba"))


def require_home() -> None:
    """Raises UsageError if the user has no home."""
    if not has_home():
        raise UsageError(
            "this user has neither $HOME nor an account with a home, and models are cached there; set HOME to a folder"
        )
