"""The final adapter as the site keeps it: a PEFT folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from fedhds.errors import StorageError


def write_adapter_folder(folder: Path, adapter: Path, config: str, card: str) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and README.md, each whole or not at all, the tensors last.

    Several sites of one process write the same content, so order does not matter. Raises StorageError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _place(folder / "adapter_config.json", config)
        _place(folder / "README.md", card)
        _place(folder / "adapter_model.safetensors", adapter)
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {folder}: {error.strerror}; make room there") from error


def _place(path: Path, content: str | Path) -> None:
    # A name of its own: sites of one process deliver to the same folder at the same time.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        partial.chmod(0o644)
        if isinstance(content, Path):
            shutil.copyfile(content, partial)
        else:
            partial.write_text(content, encoding="utf-8")
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        # Only a failure leaves it: half an adapter on a full disk.
        partial.unlink(missing_ok=True)
