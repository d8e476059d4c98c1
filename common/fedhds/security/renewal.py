"""Certificates and keys that are renewed on disk while a daemon runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from fedhds.errors import FedhdsError

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")
_Stamp = tuple[int, int, int] | None


class Renewal:
    """Notices that files changed since they were last looked at. May be asked from any thread."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._lock = threading.Lock()
        self._seen = self._stamps()

    def load(self, read: Callable[[], Loaded]) -> Loaded | None:
        """What `read` makes of files that changed; None while they are as before.

        Also None, with a warning, when `read` raises FedhdsError or OSError: a pair of files is not renewed in one
        step, and then those before stay in use until the files change once more.
        """
        with self._lock:
            now = self._stamps()
            if now == self._seen:
                return None
            self._seen = now
            try:
                loaded = read()
            except (FedhdsError, OSError) as error:
                logger.warning("the TLS files have changed and cannot be used: %s. Those before stay in use", error)
                return None
            logger.info("the TLS files have changed; new connections use them")
            return loaded

    def _stamps(self) -> list[_Stamp]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
