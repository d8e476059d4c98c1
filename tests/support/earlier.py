"""A run as a version leaves it when everything dies in round 2; `make upgrade-fixture TAG=v1.2.3` packs one.

The code is that of a git tag, or of the work tree (TAG=worktree); the packages are those of this environment. The
archive beside this file, named after the version, has the run folder, the sites' state folders, their shards and the
base model.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support import standing_still
from tests.support.federation import PATIENCE_S, Federation
from tests.support.programs import BIN
from tests.support.tiny import make_model, write_rows

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "e2e"
WORK_TREE = "worktree"
PACKAGES = ("common", "server", "client")
SITES = "ab"
# The coordinator never loads the model, so a name will do, which is the same wherever the archive is unpacked.
MODEL = Path("tiny")
COORDINATOR = (
    "--rounds=3",
    "--selection-strategy=fedhds-aligned",
    "--selection-schedule=per-round",
    "--selection-budget=8",
    "--server-optimizer=momentum",
    "--reduction=pca",
    "--feature-dimension=16",
    "--quorum=100%",
    "--min-evaluators=1",
    "--evaluate-every=1",
)
SITE = {"a": ("--data=a.jsonl", "--eval-data=b.jsonl"), "b": ("--data=b.jsonl",)}


def git(*arguments: str) -> bytes:
    """What git prints about this repository."""
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def has_tag(tag: str) -> bool:
    """Whether this is a git repository that has the tag; a shallow clone has none."""
    try:
        git("rev-parse", "--verify", "--quiet", f"refs/tags/{tag}")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def code_of(tag: str) -> Iterator[dict[str, str]]:
    """The environment in which the installed console scripts run the code of a tag, or of the work tree."""
    with tempfile.TemporaryDirectory() as name:
        folder = ROOT if tag == WORK_TREE else Path(name)
        if tag != WORK_TREE:
            subprocess.run(["tar", "-x", "-C", name], input=git("archive", tag, *PACKAGES), check=True)
        yield {"PYTHONPATH": os.pathsep.join(str(folder / package) for package in PACKAGES)}


def client_flags(federation: Federation, name: str) -> list[object]:
    """Flags of a site on its shard in the federation's folder."""
    folder = federation.folder
    data = [flag.replace("=", f"={folder}/") for flag in SITE[name]]
    return federation.client_flags(name, *data, f"--model={folder / MODEL}")


def interrupt(folder: Path, environment: dict[str, str]) -> None:
    """Runs a federation until site a's update of round 2 is accepted and half of site b's is there; then all die."""
    make_model(folder / MODEL, hidden=8, layers=1)
    for name in SITES:
        write_rows(folder / f"{name}.jsonl", {name: 7, "sea": 5})
    federation = Federation(folder, MODEL)
    federation.environment = environment
    try:
        server = federation.server(*COORDINATOR)
        federation.start("a", "fedhds-client", *client_flags(federation, "a"))
        prefix = (sys.executable, standing_still.__file__)
        federation.start("b", "fedhds-client", *client_flags(federation, "b"), prefix=prefix)
        deadline = time.monotonic() + PATIENCE_S
        while not half_of_round_2(folder):
            assert server.process.poll() is None, server.text
            assert time.monotonic() < deadline, "\n".join(daemon.text for daemon in federation.daemons)
            time.sleep(0.1)
    finally:
        # As a power cut would, all of them.
        federation.stop()
    for log in folder.glob("*.log"):
        log.unlink()


def half_of_round_2(folder: Path) -> bool:
    """Whether the update of site a is accepted and that of another site is on its way."""
    stage = state(folder)["stage"] or {}
    training = (stage.get("kind"), stage.get("round_number")) == ("train", 2)
    return training and "a" in stage["replies"] and any((folder / "run" / "artifacts").glob("*.part"))


def state(folder: Path) -> dict[str, Any]:
    """The state of the run in a folder that a coordinator has open; what it holds is as that version wrote it."""
    with closing(sqlite3.connect(f"file:{folder / 'run' / 'run.db'}?mode=ro", uri=True)) as database:
        row = database.execute("select state from run").fetchone()
    read: dict[str, Any] = json.loads(row[0])
    return read


def journal(folder: Path) -> list[str]:
    """The run's history."""
    with closing(sqlite3.connect(f"file:{folder / 'run' / 'run.db'}?mode=ro", uri=True)) as database:
        return [message for (message,) in database.execute("select message from journal order by sequence")]


def looked_at(folder: Path, copy: Path) -> tuple[dict[str, Any], list[str]]:
    """State and journal of a dead run, read off a copy: to open a database alone changes its files."""
    shutil.copytree(folder / "run", copy / "run", symlinks=True)
    return state(copy), journal(copy)


def archive_of(version: str) -> Path:
    """Where the packed run of a version lies."""
    return FIXTURES / f"v{version}.tar.gz"


def unpacked_run(version: str, folder: Path) -> Path:
    """The packed run of a version, in a new folder."""
    with tarfile.open(archive_of(version)) as packed:
        packed.extractall(folder, filter="data")
    return folder


def main() -> None:
    """Packs what the version of the tag, or of the work tree, leaves behind."""
    (tag,) = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name, code_of(tag) as environment:
        asked = subprocess.run([BIN / "fedhds-server", "--version"], env=os.environ | environment, capture_output=True)
        program, version = asked.stdout.decode().split()
        assert program == "fedhds-server"
        assert tag in (WORK_TREE, f"v{version}")
        folder = Path(name)
        interrupt(folder, environment)
        with tarfile.open(archive_of(version), "w:gz") as packed:
            for path in sorted(folder.iterdir()):
                packed.add(path, arcname=path.name)


if __name__ == "__main__":
    main()
