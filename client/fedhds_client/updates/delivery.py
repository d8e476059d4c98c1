"""The final adapter as the site keeps it: a PEFT folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedhds.runtime.files import replace_file, replacing

CARD = "README.md"


def write_adapter_folder(folder: Path, adapter: Path, config: str, card: str, generation_config: str) -> None:
    """Writes adapter_config.json, generation_config.json, README.md and adapter_model.safetensors.

    Each is whole or not written at all, and the tensors come last.

    Several sites of one process write the same content, so order does not matter. Raises StorageError.
    """
    replace_file(folder / "adapter_config.json", config, shared=True)
    replace_file(folder / "generation_config.json", generation_config, shared=True)
    replace_file(folder / CARD, card, shared=True)
    with replacing(folder / "adapter_model.safetensors", shared=True) as file, adapter.open("rb") as source:
        shutil.copyfileobj(source, file)
