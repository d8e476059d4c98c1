"""Wall clocks of processes that tests set."""

from __future__ import annotations

from pathlib import Path

import pytest


def library() -> Path:
    """Debian's libfaketime, which fakes the wall clock of a process."""
    found = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)
    if found is None:
        pytest.skip("libfaketime is not installed (Debian: libfaketime)")
    return found


class Clock:
    """The wall clock of one process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.jump("+0")

    def jump(self, offset: str) -> None:
        """Sets how far it is from the true time, as faketime writes it."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(offset)
        partial.replace(self._path)

    def environment(self) -> dict[str, str]:
        """What a process needs in order to go by it."""
        return {
            "LD_PRELOAD": str(library()),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
