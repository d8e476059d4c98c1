"""A global adapter as a PEFT folder with its model card, whole at every instant."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fedhds.errors import StorageError
from fedhds.runtime.files import sync

LAST, BEST = "checkpoint", "checkpoint-best"


def write_checkpoint(
    folder: Path, adapter: Path, config: str, card: str, generation_config: str = "", *, name: str = LAST
) -> None:
    """Makes `folder/name` a link to a new complete folder and removes the one before; raises StorageError.

    An empty `generation_config` is not written.

    The link is swapped by a rename, so that a reader, or a crash at any instant, finds one whole version.
    """
    link, versions = folder / name, folder / f"{name}s"
    try:
        versions.mkdir(exist_ok=True)
        current = os.readlink(link) if link.is_symlink() else ""
        # Two names that take turns: the one that is not linked may be half-written and is overwritten.
        version = versions / ("b" if current.endswith("a") else "a")
        shutil.rmtree(version, ignore_errors=True)
        version.mkdir()
        (version / "adapter_config.json").write_text(config, encoding="utf-8")
        (version / "README.md").write_text(card, encoding="utf-8")
        if generation_config:
            (version / "generation_config.json").write_text(generation_config, encoding="utf-8")
        shutil.copyfile(adapter, version / "adapter_model.safetensors")
        for file in version.iterdir():
            sync(file)
        sync(version)
        sync(versions)
        partial = folder / f"{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(Path(versions.name) / version.name)
        partial.replace(link)
        sync(folder)
        if current:
            shutil.rmtree(folder / current, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write the checkpoint to {folder}: {error.strerror or error}; make room there"
        ) from error
