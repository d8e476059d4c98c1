"""Names of files and folders in a site's state folder."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_key(text: str) -> str:
    """A file name for any text: its SHA-256, shortened; names of sites and tasks contain slashes."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def report_folder(folder: Path, run_id: str, task_id: str) -> Path:
    """Where the site's own report on a selection is, below its state `folder`."""
    return folder / "reports" / file_key(run_id) / file_key(task_id)
