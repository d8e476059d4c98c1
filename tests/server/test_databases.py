"""What is SQLite's or PostgreSQL's own: how each of them fails, and how it is set up."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedhds.errors import SettingsError, StorageError
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.sql import SqlStore
from tests.support.postgres import PostgresServer
from tests.support.stores import Place, state

# SQLite.


def test_a_locked_database_is_waited_for(sqlite: Place, tmp_path: Path) -> None:
    store = sqlite.leading()
    store.save(state())
    connection = sqlite3.connect(tmp_path / "run.db", isolation_level=None, check_same_thread=False)
    connection.execute("begin immediate")
    release = threading.Timer(0.3, lambda: connection.execute("commit"))
    release.start()
    store.save(state(1))
    release.join()
    connection.close()
    assert store.load() == state(1)


def test_a_database_that_stays_locked_is_a_named_error_and_works_again_afterwards(
    sqlite: Place, tmp_path: Path
) -> None:
    store = sqlite.leading()
    store.save(state())
    connection = sqlite3.connect(tmp_path / "run.db", isolation_level=None)
    connection.execute("begin immediate")
    with pytest.raises(StorageError, match=r"run\.db: database is locked"):
        store.save(state(1))
    assert store.load() == state()
    connection.execute("commit")
    connection.close()
    store.save(state(2))
    assert store.load() == state(2)


def test_no_database_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "run.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"run\.db"):
        SqlStore.in_folder(tmp_path)


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which a test can fill up or make read-only."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


def test_a_read_only_disk_is_a_named_error_and_works_again_afterwards(file_system: Path) -> None:
    store = SqlStore.in_folder(file_system)
    assert store.acquire("h", "h:1", 60.0)
    store.save(state(1))
    store.close()
    remount(file_system, "ro")
    with pytest.raises(StorageError, match=r"run\.db.*neither full nor read-only"):
        store.save(state(2))
    remount(file_system, "rw")
    store.save(state(3))
    assert store.load() == state(3)
    store.close()


def test_a_full_disk_is_a_named_error_and_works_again_afterwards(file_system: Path) -> None:
    store = SqlStore.in_folder(file_system)
    assert store.acquire("h", "h:1", 60.0)
    store.save(state(1))
    filler = file_system / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2 << 20))
    entries = [JournalEntry(1.0, "x" * 200_000)]
    with pytest.raises(StorageError, match="full"):
        store.save(state(2), entries)
    assert store.load() == state(1)
    filler.unlink()
    store.save(state(3), entries)
    assert store.load() == state(3)
    store.close()


# PostgreSQL.


def test_a_server_that_is_stopped_is_a_named_error_and_works_again_afterwards(
    shared: Place, postgres: PostgresServer
) -> None:
    store = shared.leading()
    store.save(state(1))
    postgres.stop()
    try:
        for use in (lambda: store.save(state(2)), store.load, store.renew, shared.open):
            with pytest.raises(StorageError, match=r"refused.*check that the server runs"):
                use()
    finally:
        postgres.start()
    assert store.load() == state(1)
    store.save(state(3))
    assert store.load() == state(3)


def test_a_connection_that_is_cut_costs_no_save(shared: Place, postgres: PostgresServer) -> None:
    store = shared.leading()
    store.save(state(1))
    postgres.cut(shared.argument)
    store.save(state(2))
    assert store.load() == state(2)


def test_a_connection_that_is_cut_in_mid_save_is_a_named_error(shared: Place, postgres: PostgresServer) -> None:
    store = shared.leading()
    store.save(state(1))
    with shared.engine.connect() as other:
        # The save waits for this row; meanwhile its connection is cut.
        other.exec_driver_sql("update run set format = 1")
        cut = threading.Timer(0.5, lambda: postgres.cut(shared.argument))
        cut.start()
        with pytest.raises(StorageError, match="terminating connection"):
            store.save(state(2))
        cut.join()
        other.invalidate()
    assert store.load() == state(1)
    store.save(state(3))
    assert store.load() == state(3)


def test_a_read_only_server_is_a_named_error_and_works_again_afterwards(
    shared: Place, postgres: PostgresServer
) -> None:
    name = shared.argument.rpartition("/")[2]
    store = shared.leading()
    store.save(state(1))
    postgres.execute("postgres", f"alter database {name} set default_transaction_read_only = on")
    postgres.cut(shared.argument)
    with pytest.raises(StorageError, match="read-only"):
        store.save(state(2))
    assert store.load() == state(1)
    postgres.execute("postgres", f"alter database {name} set default_transaction_read_only = off")
    postgres.cut(shared.argument)
    store.save(state(3))
    assert store.load() == state(3)


def test_saves_are_durable_also_where_the_database_is_told_otherwise(shared: Place, postgres: PostgresServer) -> None:
    name = shared.argument.rpartition("/")[2]
    for setting, used in (("off", "on"), ("remote_apply", "remote_apply")):
        postgres.execute("postgres", f"alter database {name} set synchronous_commit = {setting}")
        store = shared.open()
        with store._engine.connect() as connection:
            assert connection.exec_driver_sql("show synchronous_commit").scalar_one() == used


def test_a_database_holds_a_run_per_schema(shared: Place) -> None:
    shared.execute("create schema one")
    shared.execute("create schema two")
    for number, name in enumerate(["one", "two"]):
        store = SqlStore.at(f"{shared.argument}?options=-csearch_path%3D{name}")
        assert store.load() is None
        assert store.acquire(name, name, 60.0)
        store.save(state(number))
        assert store.load() == state(number)
        store.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///secret.db",
        "mysql://u:secret@h/d",
        "postgresql+asyncpg://u:secret@h/d",
        "postgresql://u:sec@ret@h/d",
        "postgresql://h:secret",
        "secret",
        "",
    ],
)
def test_what_is_no_url_of_postgresql_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match=r"--store: .*postgresql://") as caught:
        SqlStore.at(url)
    error: BaseException | None = caught.value
    while error:
        assert "sec" not in str(error)
        error = None if error.__suppress_context__ else error.__context__


@pytest.mark.parametrize(
    "change",
    [lambda url: url.replace("fedhds:", "nobody:"), lambda url: url.replace("test", "absent"), lambda url: url],
    ids=["user", "database", "password"],
)
def test_a_server_that_refuses_is_a_named_error_without_the_password(
    shared: Place, change: Callable[[str], str]
) -> None:
    url = change(shared.argument)
    if url == shared.argument:
        url = url.replace("s3cret", "wr0ng-s3cret")
    for spelling in (url, _password_in_query(url)):
        with pytest.raises(StorageError, match=r"postgresql.*127\.0\.0\.1.*FATAL") as caught:
            SqlStore.at(spelling)
        assert "cret" not in str(caught.value)


def _password_in_query(url: str) -> str:
    user, _, rest = url.removeprefix("postgresql://").partition(":")
    password, _, place = rest.partition("@")
    return f"postgresql://{user}@{place}?password={password}"


def test_a_driver_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SettingsError, match=r"pip install 'fedhds\[postgres\]'"):
        SqlStore.at("postgresql://u:secret@h/d")
