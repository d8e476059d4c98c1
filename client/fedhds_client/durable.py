"""Files of a site's state folder, replaced whole, durably, and readable by their owner alone."""

from __future__ import annotations

import os
from pathlib import Path

from fedhds.errors import StorageError


def write_private(path: Path, content: bytes) -> None:
    """Replaces the file whole and durably, for its owner alone; raises StorageError."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        for changed in (path.parent, path.parent.parent):
            descriptor = os.open(changed, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; make room there") from error
