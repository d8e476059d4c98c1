"""The coordinator's disk and database fail: the error is named, and nothing that was accepted is lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

SITES = "ab"
# Rank 64 makes an adapter larger than what is left of its disk.
FLAGS = ("--rounds=2", "--selection-strategy=full", "--min-sites=2", "--lora-rank=64")


def begin(federation: Federation, run: str) -> tuple[Daemon, list[Daemon]]:
    """A coordinator and its sites."""
    server = federation.server(*FLAGS, run=run)
    sites = []
    for name in SITES:
        path = write_rows(federation.folder / f"{name}.jsonl", {name: 8})
        state = f"--state={federation.folder / f'state-{Path(run).name}' / name}"
        sites.append(federation.client(name, f"--data={path}", state, server=federation.address(run)))
    return server, sites


def outcome(federation: Federation, run: str, server: Daemon, sites: list[Daemon]) -> bytes:
    """The final adapter, to which every site gave in every round."""
    statuses = (server.wait(), *(site.wait() for site in sites))
    assert not any(statuses), server.text + "".join(site.text for site in sites)
    assert server.text.count("closed with 2 updates") == 2, server.text
    assert "Traceback" not in server.text + "".join(site.text for site in sites)
    return (federation.folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def small_disk(federation: Federation) -> Iterator[Path]:
    """A file system of 8 MiB; what runs on it is ended before it goes."""
    folder = federation.folder / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    federation.stop()
    subprocess.run(["umount", str(folder)], check=True)


def unchangeable(folder: Path) -> Callable[[], None]:
    """Lets nobody, not even root, make or remove a file in a folder; gives what ends that."""
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", str(folder)], capture_output=True).returncode:
        pytest.skip("this file system or user makes no folder immutable")

    def restore() -> None:
        subprocess.run(["chattr", "-i", str(folder)], check=True)

    return restore


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_without_room_for_an_upload(federation: Federation, small_disk: Path) -> None:
    undisturbed = outcome(federation, "plain", *begin(federation, "plain"))
    server, sites = begin(federation, "small/run")
    server.wait_for("round 1 of 2 opens")
    # Room for half an adapter, whatever else has been written.
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        usage = shutil.disk_usage(small_disk)
        file.write(os.urandom(max(0, usage.free - len(undisturbed) // 2)))
    # It is seen before the first byte is taken, or where something else fills the disk meanwhile, at a write.
    server.wait_for("make room there")
    filler.unlink()
    assert outcome(federation, "small/run", server, sites) == undisturbed


@pytest.mark.long
def test_a_run_folder_that_becomes_read_only_and_writable_again(federation: Federation) -> None:
    undisturbed = outcome(federation, "plain", *begin(federation, "plain"))
    server, sites = begin(federation, "run")
    server.wait_for("round 1 of 2 opens")
    restore = unchangeable(federation.folder / "run" / "artifacts")
    try:
        server.wait_for("cannot use the artifact folder")
    finally:
        restore()
    assert outcome(federation, "run", server, sites) == undisturbed


def test_a_run_folder_that_is_read_only_at_the_start_is_said(federation: Federation, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    flags = federation.server_flags(*FLAGS, run="small/run")
    server = federation.start("server", "fedhds-server", *flags)
    assert server.wait() == 1
    assert "Read-only file system; choose another with --run-folder" in server.text
    assert "Traceback" not in server.text


@pytest.mark.long
def test_a_database_that_another_process_locks_for_longer_than_is_waited(federation: Federation) -> None:
    undisturbed = outcome(federation, "plain", *begin(federation, "plain"))
    server, sites = begin(federation, "run")
    server.wait_for("round 1 of 2 opens")
    with contextlib.closing(sqlite3.connect(federation.folder / "run" / "run.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        server.wait_for("database is locked")
        while time.monotonic() < began + 15:
            time.sleep(0.1)
        other.execute("ROLLBACK")
    assert outcome(federation, "run", server, sites) == undisturbed


def _overwritten(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(os.urandom(4096))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda path: _overwritten(path, 0), "not a database", id="header"),
        pytest.param(lambda path: _overwritten(path, 4096), "malformed", id="page", marks=pytest.mark.long),
        pytest.param(lambda path: os.truncate(path, 0), "no state", id="emptied", marks=pytest.mark.long),
        pytest.param(lambda path: path.unlink(), "no state", id="gone", marks=pytest.mark.long),
    ],
)
def test_a_corrupted_database_is_said_and_nothing_is_overwritten(
    federation: Federation, damage: Callable[[Path], None], words: str
) -> None:
    server, sites = begin(federation, "run")
    server.wait_for("round 1 of 2 opens")
    for daemon in (*sites, server):
        daemon.kill()
    run = federation.folder / "run"
    # The log of what is not yet in the database is moved there, so that the damage counts.
    with contextlib.closing(sqlite3.connect(run / "run.db")) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(run / "run.db")
    before = contents(run / "artifacts")
    assert before
    state = (run / "run.db").read_bytes() if (run / "run.db").exists() else None
    again = federation.start("server", "fedhds-server", *federation.server_flags(*FLAGS))
    assert again.wait() == 1, again.text
    assert words in again.text
    assert "restore" in again.text
    assert "Traceback" not in again.text
    assert contents(run / "artifacts") == before
    if state:
        assert (run / "run.db").read_bytes() == state
