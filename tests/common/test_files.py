"""Replaced files are old or new, never a part, and durable; modes are right; a lock ends with its process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedhds.errors import StorageError
from fedhds.runtime.files import locked, make_folder, replace_file, replacing

WAYS = pytest.mark.parametrize("shared", [False, True])


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@contextmanager
def child(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that has printed a line; it is killed in the end."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline()
            yield process
        finally:
            process.kill()


@WAYS
@pytest.mark.parametrize("private", [False, True])
def test_a_file_is_made_with_its_folders_and_replaced(tmp_path: Path, shared: bool, private: bool) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in ("Größe 🐈\n", b"\0\xff", b""):
        replace_file(path, content, private=private, shared=shared)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("shared", "private", "mask", "expected"),
    [
        (False, False, 0o022, 0o644),
        (False, False, 0o077, 0o600),
        (False, True, 0o000, 0o600),
        (True, False, 0o077, 0o644),
        (True, True, 0o000, 0o600),
    ],
)
def test_a_file_has_the_mode_that_was_asked_for(
    tmp_path: Path, shared: bool, private: bool, mask: int, expected: int
) -> None:
    path = tmp_path / "folder" / "file"
    with umask(mask):
        replace_file(path, b"1", private=private, shared=shared)
    assert mode(path) == expected
    assert mode(path.parent) == (0o700 if private else 0o777 & ~mask)


@WAYS
def test_a_private_file_is_never_readable_by_others(tmp_path: Path, shared: bool) -> None:
    """Not while it is written, though an earlier file and what a crash left are."""
    path = tmp_path / "file"
    for left in (path, tmp_path / "file.partial"):
        left.touch()
        left.chmod(0o644)
    with umask(0), replacing(path, private=True, shared=shared) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 == 0o600
    assert mode(path) == 0o600


@WAYS
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_of_the_block_passes_through_and_leaves_the_file_as_it_was(
    tmp_path: Path, shared: bool, error: BaseException
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old", shared=shared)

    def fail() -> None:
        with replacing(path, shared=shared) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@WAYS
@pytest.mark.parametrize("owner", [os, Path])
def test_a_full_disk_is_a_named_error_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool, owner: object
) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old", shared=shared)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(owner, "fsync" if owner is os else "replace", full)
    with pytest.raises(StorageError, match=f"^cannot write {path}: No space left on device; make room there$"):
        replace_file(path, b"new", shared=shared)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@WAYS
def test_a_place_that_cannot_hold_the_file_is_a_named_error(tmp_path: Path, shared: bool) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / "file" / "far" / "below"):
        with pytest.raises(StorageError, match=f"cannot write {path}: (Is a directory|Not a directory|File exists)"):
            replace_file(path, b"1", shared=shared)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_content_then_names_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before its rename, its folder after it; a new folder's name in the folder above."""
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append(str(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)))
        fsync(descriptor)

    def replaced(partial: Path, path: Path) -> Path:
        steps.append("rename")
        return replace(partial, path)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    replace_file(tmp_path / "a" / "b" / "file", b"1")
    assert steps == [".", "a", "a/b/file.partial", "rename", "a/b"]


@WAYS
def test_readers_find_whole_contents_while_a_writer_is_killed(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 300_000 for number in range(2)]
    replace_file(path, contents[0], shared=shared)
    script = """
import sys
from itertools import count
from pathlib import Path
from fedhds.runtime.files import replace_file
print("ready", flush=True)
for turn in count():
    replace_file(Path(sys.argv[1]), bytes([turn % 2]) * 300_000, shared=sys.argv[2] == "True")
"""
    for _ in range(3):
        with child(script, path, shared) as process:
            for _ in range(20):
                assert path.read_bytes() in contents
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert path.read_bytes() in contents
    replace_file(path, b"after", shared=shared)
    assert path.read_bytes() == b"after"
    if not shared:
        assert list(tmp_path.iterdir()) == [path]


def test_threads_replace_a_shared_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(replace_file, path, content, shared=True) for content in contents * 5]
        while not all(writer.done() for writer in writers):
            assert not path.exists() or path.read_bytes() in contents
        for writer in writers:
            writer.result()
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_made_once_and_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "folder"
    for private in (True, False):
        make_folder(folder, private=private)
        assert mode(folder) == 0o700
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file")


HOLDER = """
import sys, time
from pathlib import Path
from fedhds.runtime.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_of_another_process_is_refused_until_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with child(HOLDER, path) as process:
        with pytest.raises(BlockingIOError), locked(path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(path):
            pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    entered = threading.Event()

    def wait() -> None:
        with locked(path, wait=True):
            entered.set()

    with child(HOLDER, path) as process:
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.2)
        process.send_signal(signal.SIGKILL)
        assert entered.wait(60)
        thread.join()


def test_a_lock_keeps_threads_of_one_process_apart_and_is_free_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def fail() -> None:
        with locked(path):
            with pytest.raises(BlockingIOError), locked(path):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with locked(path) as descriptor:
        os.write(descriptor, b"holder")
    with locked(path) as descriptor:
        assert os.read(descriptor, 64) == b"holder"
    assert mode(path) == 0o600
