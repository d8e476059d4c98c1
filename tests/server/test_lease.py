"""Who leads: the lease of every store, and a coordinator that keeps it and loses it."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from fedhds.errors import NotLeading, StorageError
from fedhds.grpc_errors import error_of
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.leadership import leadership
from fedhds_server.leadership.leadership import Leadership
from fedhds_server.storage.base import JournalEntry
from fedhds_server.storage.sql import SqlStore
from tests.support.host import start
from tests.support.stores import Place, state


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


@pytest.mark.slow
def test_a_lease_is_one_holders_until_it_runs_out(shared: Place) -> None:
    first = shared.leading("one", lease_s=3.0)
    second = shared.open()
    assert not second.acquire("two", "two:1", 60.0)
    assert second.leader() == "one:1"
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        first.renew()
        assert not second.acquire("two", "two:1", 60.0)
        time.sleep(0.02)
    while not second.acquire("two", "two:1", 60.0):
        assert time.monotonic() < until + 10.0
        time.sleep(0.02)
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


# The coordinator's part.


async def test_the_lease_is_kept_while_the_work_goes_on_and_given_up_after_it(
    shared: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leadership, "LEASE_S", 3.0)
    monkeypatch.setattr(leadership, "_RENEW_S", 0.2)
    kept = Leadership(shared.open(), "one", "one:1")
    other = shared.open()
    granted: list[bool] = []

    async def work() -> None:
        for _ in range(10):
            await asyncio.sleep(0.4)
            granted.append(await asyncio.to_thread(other.acquire, "two", "two:1", 60.0))

    await kept.gained()
    await kept.kept_during(work())
    assert granted == [False] * 10
    await kept.given_up()
    assert other.acquire("two", "two:1", 60.0)
    kept.close()


async def test_work_is_cancelled_when_another_has_taken_the_lease(shared: Place) -> None:
    deposed = Leadership(shared.open(), "one", "one:1")
    await deposed.gained()
    work = asyncio.get_running_loop().create_future()

    async def never() -> None:
        await work

    successor = shared.open()
    assert successor.acquire("one", "elsewhere:1", 60.0)
    with pytest.raises(NotLeading, match="elsewhere:1 does"):
        await deposed.kept_during(never())
    assert work.cancelled()
    # Nor does it give up what is another's.
    await deposed.given_up()
    successor.save(state())
    deposed.close()


async def test_a_leader_that_gets_no_answer_for_as_long_as_the_lease_stops_leading(
    sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leadership, "LEASE_S", 1.0)
    monkeypatch.setattr(leadership, "_RENEW_S", 0.2)
    store = sqlite.open()
    answered = threading.Event()
    monkeypatch.setattr(store, "renew", answered.wait)
    cut_off = Leadership(store, "one", "one:1")
    await cut_off.gained()
    began = time.monotonic()
    with pytest.raises(NotLeading, match="could not be renewed for 1 s: the state database does not answer"):
        await cut_off.kept_during(asyncio.sleep(60))
    assert 0.9 < time.monotonic() - began < 10.0
    answered.set()
    await cut_off.given_up()
    cut_off.close()


async def test_a_call_to_a_leader_that_was_deposed_leaves_no_trace_and_ends_its_work(tmp_path: Path) -> None:
    host = await start(tmp_path)
    successor = SqlStore.in_folder(tmp_path)
    assert successor.acquire("test", "", 60.0)
    before = successor.load()
    calls = [host.federation.Enroll(pb.EnrollRequest(site=name, protocol_versions=[2]), timeout=20) for name in "abc"]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error_of(answer), StorageError) for answer in answers), answers
    with pytest.raises(NotLeading):
        await host.work
    assert successor.load() == before
    successor.close()
    await host.stop()
