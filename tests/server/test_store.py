"""One suite for every store."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedhds.errors import StorageError
from fedhds.runspec import RunSpec
from fedhds_server.state import RunState
from fedhds_server.store.base import JournalEntry, Store
from fedhds_server.store.sql import SqlStore

Opener = Callable[[], Store]


@pytest.fixture(params=["sqlite"])
def opened(tmp_path: Path) -> Iterator[Opener]:
    """Opens the same store again and again."""
    stores: list[Store] = []

    def open_store() -> Store:
        stores.append(SqlStore.in_folder(tmp_path))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def state(round_number: int = 0) -> RunState:
    return RunState(run_id="r", spec=RunSpec(model="m", rounds=3), round=round_number)


def test_a_new_store_is_empty(opened: Opener) -> None:
    store = opened()
    assert store.load() is None
    assert store.journal() == []


def test_what_is_saved_is_there_after_a_restart(opened: Opener) -> None:
    entries = [JournalEntry(1.0, "one"), JournalEntry(2.0, "two", trouble=True)]
    first = opened()
    first.save(state(), entries[:1])
    first.save(state(2), entries[1:])
    first.close()
    again = opened()
    assert again.load() == state(2)
    assert again.journal() == entries


def test_a_save_that_is_cut_short_leaves_the_state_before(opened: Opener, tmp_path: Path) -> None:
    store = opened()
    store.save(state(1))
    store.close()
    # A child writes within a transaction and dies before it commits.
    child = os.fork()
    if not child:
        connection = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
        connection.execute("begin immediate")
        connection.execute("update run set state = 'torn'")
        os._exit(0)
    os.waitpid(child, 0)
    assert opened().load() == state(1)


def test_a_locked_database_is_waited_for(opened: Opener, tmp_path: Path) -> None:
    store = opened()
    store.save(state())
    connection = sqlite3.connect(tmp_path / "run.db", isolation_level=None, check_same_thread=False)
    connection.execute("begin immediate")
    release = threading.Timer(0.3, lambda: connection.execute("commit"))
    release.start()
    store.save(state(1))
    release.join()
    connection.close()
    assert store.load() == state(1)


def test_a_damaged_state_is_a_named_error(opened: Opener, tmp_path: Path) -> None:
    opened().save(state())
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("update run set state = '{}'")
    connection.close()
    with pytest.raises(StorageError, match="cannot be read"):
        opened().load()


def test_the_state_of_a_newer_program_is_refused(opened: Opener, tmp_path: Path) -> None:
    opened().save(state())
    with sqlite3.connect(tmp_path / "run.db") as connection:
        connection.execute("update run set format = 99")
    connection.close()
    with pytest.raises(StorageError, match="format 99"):
        opened().load()


def test_no_database_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"run\.db"):
        SqlStore.in_folder(tmp_path)
