"""Names of files and folders in a site's state folder."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from fedhds.errors import StorageError

MAX_RUNS = 8
"""Runs of which a site keeps selections: those that it takes part in by turns, and some to look back at."""
MAX_REPORTS = 20
"""Reports for people that a site keeps of one run; a selection per round would fill any disk."""


def file_key(text: str) -> str:
    """A file name for any text: its SHA-256, shortened; names of sites and tasks contain slashes."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def report_folder(folder: Path, run_id: str, task_id: str) -> Path:
    """Where the site's own report on a selection is, below its state `folder`."""
    return folder / "reports" / file_key(run_id) / file_key(task_id)


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the `count` entries of `folder` that were changed last; raises StorageError."""
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
        for entry in entries[count:]:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise StorageError(f"cannot delete what is no longer needed in {folder}: {error.strerror}") from error
