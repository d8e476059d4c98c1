"""One suite for every store."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from fedhds.errors import StorageError
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.schema import JOURNAL, METADATA, RUN
from tests.support.stores import Place, state


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
from tests.support.stores import state
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.sql import SqlStore
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


@pytest.mark.slow
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
        assert found.round_number in (last, last + 1)
        assert store.journal()[-1].at == found.round_number


def test_a_damaged_state_is_a_named_error(place: Place) -> None:
    place.leading().save(state())
    place.execute("update run set state = '{}'")
    with pytest.raises(StorageError, match="cannot be read"):
        place.open().load()


def test_the_state_of_a_newer_program_is_refused(place: Place) -> None:
    place.leading().save(state())
    place.execute("update run set format = 99")
    with pytest.raises(StorageError, match="format 99, which a newer version of fedhds wrote"):
        place.open().load()


@pytest.mark.parametrize("migrated", [True, False])
def test_a_run_of_format_1_is_refused_naming_the_version_that_opens_it_and_left_alone(
    place: Place, migrated: bool
) -> None:
    # What that version wrote, as far as it matters: its state has other fields.
    values = {"id": 1, "format": 1, "state": '{"run_id": "r", "spec": {"model": "m"}, "round": 2}'}
    if migrated:
        place.open()
    else:
        METADATA.create_all(place.engine, tables=[RUN, JOURNAL])
    with place.engine.begin() as connection:
        connection.execute(sa.insert(RUN).values(values))
        connection.execute(sa.insert(JOURNAL).values(at=1.0, message="old", trouble=False))
    tables = set(sa.inspect(place.engine).get_table_names())
    with pytest.raises(
        StorageError, match=r"has format 1, which version 0\.2 of fedhds wrote.*reads format 2"
    ) as caught:
        place.open()
    assert "finish it with version 0.2, or start a new run elsewhere" in str(caught.value)
    assert set(sa.inspect(place.engine).get_table_names()) == tables
    with place.engine.connect() as connection:
        assert dict(connection.execute(sa.select(RUN)).one()._mapping) == values
        assert connection.execute(sa.select(JOURNAL.c.message)).scalars().all() == ["old"]


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
        values = {"id": 1, "format": 2, "state": state(2).model_dump_json()}
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
