"""One suite for every store, and what is each one's own."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from fedhds.errors import NotLeading, SettingsError, StorageError
from fedhds.runspec import RunSpec
from fedhds_server.state import RunState
from fedhds_server.store.base import JournalEntry
from fedhds_server.store.schema import JOURNAL, METADATA, RUN
from fedhds_server.store.sql import SqlStore
from tests.postgres import PostgresServer

Cut = Callable[[], None]


class Place:
    """A database that stores are opened on, again and again."""

    def __init__(self, argument: str, opener: Callable[[], SqlStore], engine: sa.Engine) -> None:
        self.argument = argument
        self._opener = opener
        self.engine = engine
        self.stores: list[SqlStore] = []

    def open(self) -> SqlStore:
        self.stores.append(self._opener())
        return self.stores[-1]

    def leading(self, holder: str = "h", lease_s: float = 60.0) -> SqlStore:
        """A store that holds the lease."""
        store = self.open()
        assert store.acquire(holder, f"{holder}:1", lease_s)
        return store

    def execute(self, statement: str) -> None:
        """What somebody else does to the database."""
        with self.engine.begin() as connection:
            connection.exec_driver_sql(statement)

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.engine.dispose()


def sqlite_place(folder: Path) -> Place:
    engine = sa.create_engine(f"sqlite:///{folder / 'run.db'}")
    return Place(str(folder), lambda: SqlStore.in_folder(folder), engine)


def postgres_place(postgres: PostgresServer) -> Place:
    url = postgres.create_database()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"), pool_pre_ping=True)
    return Place(url, lambda: SqlStore.at(url), engine)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty database of each kind."""
    sqlite = request.param == "sqlite"
    made = sqlite_place(tmp_path) if sqlite else postgres_place(request.getfixturevalue("postgres"))
    yield made
    made.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Place]:
    made = sqlite_place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def shared(postgres: PostgresServer) -> Iterator[Place]:
    """A database that several coordinators may open."""
    made = postgres_place(postgres)
    yield made
    made.close()


def state(round_number: int = 0) -> RunState:
    return RunState(run_id="r", spec=RunSpec(model="m", rounds=3), round=round_number)


# Every store.


def test_a_new_store_is_empty(place: Place) -> None:
    store = place.open()
    assert store.load() is None
    assert store.journal() == []
    assert store.leader() == ""


def test_what_is_saved_is_there_after_a_restart(place: Place) -> None:
    entries = [JournalEntry(1.0, "one"), JournalEntry(2.0, "two", trouble=True)]
    first = place.leading()
    first.save(state(), entries[:1])
    first.save(state(2), entries[1:])
    first.close()
    again = place.open()
    assert again.load() == state(2)
    assert again.journal() == entries


def test_a_message_may_hold_any_character(place: Place) -> None:
    store = place.leading()
    store.save(state(), [JournalEntry(1.0, "a\0b ü \N{PILE OF POO}")])
    assert store.journal()[0].message == "a\ufffdb ü \N{PILE OF POO}"


def test_state_and_journal_are_saved_together_or_not_at_all(place: Place) -> None:
    store = place.leading()
    store.save(state(1), [JournalEntry(1.0, "one")])
    place.execute("alter table journal rename to elsewhere")
    with pytest.raises(StorageError):
        store.save(state(2), [JournalEntry(2.0, "two")])
    place.execute("alter table elsewhere rename to journal")
    assert store.load() == state(1)
    assert len(store.journal()) == 1
    store.save(state(3))
    assert store.load() == state(3)


_SAVER = """
import sys
from pathlib import Path
from tests.server.test_store import state
from fedhds_server.store.base import JournalEntry
from fedhds_server.store.sql import SqlStore
place = sys.argv[1]
store = SqlStore.at(place) if "://" in place else SqlStore.in_folder(Path(place))
assert store.acquire("h", "h:1", 60.0)
for number in range(1_000_000):
    store.save(state(number), [JournalEntry(float(number), "x" * 100_000)])
    print(number, flush=True)
"""


def saver(place: Place) -> subprocess.Popen[str]:
    """A process that saves state after state, and says which."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", _SAVER, place.argument], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_a_process_that_is_killed_while_it_saves_loses_nothing_that_it_was_told_is_saved(place: Place) -> None:
    place.open()
    for _ in range(3):
        process = saver(place)
        assert process.stdout
        said = [process.stdout.readline() for _ in range(5)]
        process.kill()
        said += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        last = int([line for line in said if line.endswith("\n")][-1])
        store = place.open()
        found = store.load()
        assert found
        assert found.round in (last, last + 1)
        assert store.journal()[-1].at == found.round


def test_a_damaged_state_is_a_named_error(place: Place) -> None:
    place.leading().save(state())
    place.execute("update run set state = '{}'")
    with pytest.raises(StorageError, match="cannot be read"):
        place.open().load()


def test_the_state_of_a_newer_program_is_refused(place: Place) -> None:
    place.leading().save(state())
    place.execute("update run set format = 99")
    with pytest.raises(StorageError, match="format 99"):
        place.open().load()


def test_a_save_may_come_from_any_thread_while_the_lease_is_renewed(place: Place) -> None:
    store = place.leading()
    ended = threading.Event()
    failures: list[Exception] = []

    def renew() -> None:
        while not ended.is_set():
            try:
                store.renew()
            except StorageError as error:
                failures.append(error)
                return

    renewing = threading.Thread(target=renew)
    renewing.start()
    for number in range(20):
        store.save(state(number))
    ended.set()
    renewing.join()
    assert not failures
    assert store.load() == state(19)


# Schema.


def test_the_migrations_make_the_tables_that_the_program_uses(place: Place) -> None:
    place.open()
    with place.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_a_store_from_before_there_were_migrations_is_upgraded_and_goes_on(place: Place) -> None:
    METADATA.create_all(place.engine, tables=[RUN, JOURNAL])
    with place.engine.begin() as connection:
        values = {"id": 1, "format": 1, "state": state(2).model_dump_json()}
        connection.execute(sa.insert(RUN).values(values))
        connection.execute(sa.insert(JOURNAL).values(at=1.0, message="old", trouble=False))
    store = place.leading()
    assert store.load() == state(2)
    store.save(state(3), [JournalEntry(2.0, "new")])
    again = place.open()
    assert again.load() == state(3)
    assert [entry.message for entry in again.journal()] == ["old", "new"]


def test_the_store_of_a_newer_program_is_refused_and_left_alone(place: Place) -> None:
    place.leading().save(state(1))
    place.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(StorageError, match=r"schema 9999.*use the version that wrote it"):
        place.open()
    place.execute("update alembic_version set version_num = '0002'")
    assert place.open().load() == state(1)


def test_an_upgrade_that_is_cut_short_leaves_the_tables_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    METADATA.create_all(place.engine, tables=[RUN, JOURNAL])

    def cut(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("insert", {}, Exception("the power is cut"))

    with monkeypatch.context() as patch:
        patch.setattr("alembic.operations.Operations.bulk_insert", cut)
        with pytest.raises(StorageError, match="power is cut"):
            place.open()
    assert set(sa.inspect(place.engine).get_table_names()) == {"run", "journal"}
    place.leading().save(state())


# The lease.


def test_without_the_lease_nothing_is_saved(place: Place) -> None:
    store = place.open()
    with pytest.raises(NotLeading):
        store.save(state())
    assert store.load() is None


def test_whoever_takes_the_lease_shuts_out_whoever_had_it(place: Place) -> None:
    old = place.leading()
    old.save(state(1))
    new = place.leading()
    with pytest.raises(NotLeading, match="h:1 does"):
        old.save(state(2), [JournalEntry(1.0, "lost")])
    assert new.load() == state(1)
    assert new.journal() == []
    new.save(state(3))
    old.release()
    new.save(state(4))
    assert place.open().load() == state(4)


def test_a_lease_that_is_given_up_is_free_at_once(place: Place) -> None:
    first = place.leading("one")
    first.save(state(1))
    first.release()
    assert first.leader() == ""
    with pytest.raises(NotLeading):
        first.save(state(2))
    assert place.leading("two").load() == state(1)


def test_a_lease_is_one_holders_until_it_runs_out(shared: Place) -> None:
    first = shared.leading("one", lease_s=1.0)
    second = shared.open()
    assert not second.acquire("two", "two:1", 60.0)
    assert second.leader() == "one:1"
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        first.renew()
        assert not second.acquire("two", "two:1", 60.0)
    while not second.acquire("two", "two:1", 60.0):
        assert time.monotonic() < until + 10.0
    assert second.leader() == "two:1"
    for use in (first.renew, lambda: first.save(state())):
        with pytest.raises(NotLeading, match="two:1 does"):
            use()


def test_a_lease_that_ran_out_and_that_nobody_took_goes_on(shared: Place) -> None:
    store = shared.leading(lease_s=0.0)
    assert store.leader() == ""
    store.renew()
    store.save(state())


def test_of_many_that_ask_at_the_same_time_one_gets_the_lease(shared: Place) -> None:
    stores = [shared.open() for _ in range(8)]
    start = threading.Barrier(len(stores))
    granted: list[int] = []

    def ask(number: int) -> None:
        start.wait()
        if stores[number].acquire(f"holder {number}", "", 60.0):
            granted.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(granted) == 1


def test_a_leader_that_stands_still_in_mid_save_cannot_keep_the_lease(shared: Place) -> None:
    """Its transaction holds the lease's row; the database ends it, and nothing of it is left."""
    frozen = shared.leading("one", lease_s=0.0)
    frozen.save(state(1))
    other = shared.open()

    def stand_still() -> None:
        with frozen._transaction() as connection:
            frozen._hold(connection)
            connection.exec_driver_sql("update run set state = 'torn'")
            assert other.acquire("two", "two:1", 60.0)

    with pytest.raises(StorageError, match="idle-in-transaction"):
        stand_still()
    assert other.load() == state(1)
    with pytest.raises(NotLeading):
        frozen.save(state(2))


def test_coordinators_may_make_the_tables_of_a_database_at_the_same_time(shared: Place) -> None:
    failures: list[Exception] = []
    start = threading.Barrier(6)

    def open_one() -> None:
        start.wait()
        try:
            SqlStore.at(shared.argument).close()
        except StorageError as error:
            failures.append(error)

    threads = [threading.Thread(target=open_one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


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
        # Whoever saves waits for this row; meanwhile its connection is cut.
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
