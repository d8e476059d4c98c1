"""Large files that tests may read but that are no part of the repository: models and data in a folder beside it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared(path: str) -> Path:
    """`path` in the folder FEDHDS_SHARED, else in `shared` beside the repository; skips the test where it is absent."""
    folder = Path(os.environ.get("FEDHDS_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    found = folder / path
    if not found.exists():
        pytest.skip(f"{found} is not here; FEDHDS_SHARED names the folder that holds {path}")
    return found
