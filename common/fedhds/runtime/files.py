"""Files that survive a crash, and locks between processes: the one place that replaces, syncs and locks files.

A reader, or a crash at any instant, finds the old content or the new content of a file, never a part of it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedhds.errors import StorageError


@contextmanager
def replacing(path: Path, *, private: bool = False, shared: bool = False) -> Iterator[BinaryIO]:
    """Yields a binary file that takes the place of `path`, durably, when the block ends without an error.

    After an error `path` is as it was and the partial file is gone. Missing folders are made. A `private` file has mode
    0600 and its new folder 0700. With `shared`, several threads or processes may replace `path` at the same time: each
    writes a new file of its own, of mode 0644 unless it is private. Otherwise all use `<name>.partial`, so that the
    next writer overwrites what a crash leaves. Raises StorageError for every OSError, those of the block included.
    """
    try:
        make_folder(path.parent, private=private)
        if shared:
            descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
            partial = Path(name)
        else:
            partial = path.with_name(f"{path.name}.partial")
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                # What a crash left may have another mode; a new file of `mkstemp` has 0600.
                if private or shared:
                    os.fchmod(descriptor, 0o600 if private else 0o644)
                yield file
                file.flush()
                os.fsync(descriptor)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}; make room there") from error


def replace_file(path: Path, content: bytes | str, *, private: bool = False, shared: bool = False) -> None:
    """Replaces a file with `content` (text as UTF-8); otherwise like `replacing`. Raises StorageError."""
    with replacing(path, private=private, shared=shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path, *, private: bool = False) -> None:
    """Makes a folder, of mode 0700 if `private`, and those above it durably where they are missing. Raises OSError."""
    if folder.is_dir():
        return
    if not folder.parent.exists():
        make_folder(folder.parent)
    folder.mkdir(0o700 if private else 0o777, exist_ok=True)
    sync(folder.parent)


def take_back(folder: Path) -> None:
    """Takes the rights of group and others from a folder, unless it is not this user's. Raises OSError."""
    state = folder.stat()
    if state.st_mode & 0o077 and state.st_uid == os.geteuid():
        folder.chmod(0o700)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[int]:
    """Holds the lock file `path`, made if missing, for the length of the block; yields its descriptor.

    The kernel releases the lock when the process ends, however it ends. Raises BlockingIOError when another process
    or thread holds it and `wait` is not set, OSError when the file cannot be opened, StorageError when it is no file.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"the lock {path} is no file; delete it")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)
