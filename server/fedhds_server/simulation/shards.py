"""The sites' data: ready shards, or data that `fedhds split` deals out, once for all runs that share it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fedhds.errors import UsageError
from fedhds_server.simulation.settings import SimulationSettings

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_UNSEEN = "unseen"


@dataclass(frozen=True)
class Shards:
    """Files by the names of sites and of evaluators."""

    sites: dict[str, Path]
    evaluators: dict[str, Path]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and the bytes of all files."""
        digest = hashlib.sha256()
        for name, path in sorted((self.sites | self.evaluators).items()):
            with path.open("rb") as file:
                digest.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


def shards_of(settings: SimulationSettings) -> Shards:
    """The shards of a run, dealt out where they are not ready; raises UsageError."""
    folder = settings.shards or _split(settings)
    if not folder.is_dir():
        raise UsageError(f"--shards: {folder} is no folder")
    files = {file.name.split(".")[0]: file for file in sorted(folder.iterdir()) if file.name.endswith(_ENDINGS)}
    files.pop("manifest", None)
    unseen = files.pop(_UNSEEN, None)
    if not files:
        raise UsageError(f"--shards: {folder} holds no shard; a shard's name ends in one of {', '.join(_ENDINGS)}")
    evaluators = {_UNSEEN: unseen} if unseen else {}
    return Shards(files, evaluators | {path.name.split(".")[0]: path for path in settings.eval_data})


def _split(settings: SimulationSettings) -> Path:
    arguments: dict[str, object] = {
        "sites": settings.sites,
        "by": settings.by,
        "alpha": settings.alpha,
        "seed": settings.coordinator.run.seed,
    }
    if settings.unseen_rows:
        arguments["unseen-rows"] = settings.unseen_rows
    # A folder for each way to deal out; the same again writes the same bytes.
    content = json.dumps([*map(str, settings.data), *settings.unseen, arguments], sort_keys=True)
    folder = settings.out / "shards" / hashlib.sha256(content.encode()).hexdigest()[:12]
    words = [*map(str, settings.data), "--out", str(folder)]
    words += [word for category in settings.unseen for word in ("--unseen", category)]
    words += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    program = str(Path(sys.executable).with_name("fedhds"))
    done = subprocess.run([program, "split", *words], capture_output=True, text=True)
    if done.returncode:
        raise UsageError(done.stderr.strip().removeprefix("fedhds: ") or f"fedhds split failed: {done.stdout}")
    return folder
