"""The ledger: durable before it answers, whole after a crash, never short of what was spent on any row."""

from __future__ import annotations

import hashlib
import math
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import PrivacyError, StorageError
from fedhds.privacy.accountant import Cost
from fedhds.privacy.ledger import Account, Entry, Ledger, Limit
from fedhds.privacy.mechanisms import calibrate_noise, gaussian_epsilon

DELTA = 1e-5


def account(path: Path, rows: Sequence[object] = range(5)) -> Account:
    """The account of a shard with these rows."""
    digests = [hashlib.sha256(repr(row).encode()).digest() for row in rows]
    return Ledger(path).account(hashlib.sha256(b"".join(digests)).hexdigest(), lambda: digests)


def record(
    ledger: Account,
    task_id: str,
    payload: bytes | None = b"bytes",
    *,
    run_id: str = "run",
    z: float = 2.0,
    unit: str = "client",
    limits: Sequence[Limit] = (),
) -> Entry:
    return ledger.record(
        payload,
        run_id=run_id,
        task_id=task_id,
        cost=Cost(z),
        sensitivity=40.0,
        clip_norm=5.0,
        released=16,
        dimension=2,
        delta=DELTA,
        unit="example" if unit == "example" else "client",
        limits=limits,
    )


def limit(epsilon: float, **fields: object) -> Limit:
    return Limit(epsilon, DELTA, "--selection-max-epsilon", **fields)  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_a_new_ledger_is_empty_and_leaves_no_trace(path: Path) -> None:
    ledger = account(path)
    assert ledger.entries() == Ledger(path).entries() == []
    assert not Ledger(path).row_sets()
    assert ledger.release("run", "task") is None
    assert ledger.spent(delta=DELTA) == ledger.size() == 0
    ledger.check(Cost(1.0), unit="client", limits=())
    assert not list(path.parent.iterdir())


def test_an_entry_says_what_was_released(path: Path) -> None:
    made = record(account(path), "select/0/a")
    (entry,) = account(path).entries()
    assert entry == made
    assert entry.time.endswith("+00:00")
    assert entry.epsilon == gaussian_epsilon(noise_multiplier=2.0, delta=DELTA)
    assert entry.model_dump(exclude={"time", "epsilon"}) == {
        "run_id": "run",
        "task_id": "select/0/a",
        "release": "centroids",
        "unit": "client",
        "noise_multiplier": 2.0,
        "sample_rate": 1.0,
        "steps": 1,
        "replaced": False,
        "sensitivity": 40.0,
        "clip_norm": 5.0,
        "released": 16,
        "dimension": 2,
        "delta": DELTA,
        "digest": hashlib.sha256(b"bytes").hexdigest(),
        "rows": 5,
    }


def test_a_restart_finds_the_same_bytes_and_the_same_spending(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a", b"\x00first\n", z=2.0)
    record(ledger, "b", b"", z=3.0)
    again = account(path)
    assert (again.release("run", "a"), again.release("run", "b")) == (b"\x00first\n", b"")
    assert again.release("run", "c") is None
    assert again.release("another run", "a") is None
    assert again.entries() == ledger.entries()
    assert again.spent(delta=DELTA) == ledger.spent(delta=DELTA) > 0


def test_one_task_releases_once(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a", b"first")
    with pytest.raises(PrivacyError, match="twice"):
        record(ledger, "a", b"second")
    assert ledger.release("run", "a") == b"first"
    assert len(ledger.entries()) == 1


def test_an_adapter_that_was_trained_again_costs_again(path: Path) -> None:
    ledger = account(path)
    for _ in range(2):
        record(ledger, "train/1/a", None)
    assert ledger.spent(delta=DELTA) == gaussian_epsilon(noise_multiplier=2.0, delta=DELTA, releases=2)


def test_the_same_task_id_in_another_run_is_another_release(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a", b"one", run_id="1")
    record(ledger, "a", b"two", run_id="2")
    assert (ledger.release("1", "a"), ledger.release("2", "a")) == (b"one", b"two")


def test_bytes_of_old_runs_go_and_are_never_drawn_again(path: Path) -> None:
    ledger = account(path)
    for number in range(17):
        record(ledger, "a", run_id=f"{number}")
    assert ledger.release("1", "a") == b"bytes"
    with pytest.raises(PrivacyError, match="its bytes are gone"):
        ledger.release("0", "a")
    with pytest.raises(PrivacyError, match="twice"):
        record(ledger, "a", run_id="0")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.floats(0.1, 100)), max_size=5))
def test_spending_composes_over_all_releases_or_those_of_a_run(
    tmp_path_factory: pytest.TempPathFactory, releases: list[tuple[str, float]]
) -> None:
    ledger = account(tmp_path_factory.mktemp("site") / "ledger.db")
    for number, (run_id, z) in enumerate(releases):
        record(ledger, f"{number}", run_id=run_id, z=z)
    chosen: list[str | None] = [None, "x", "y"]
    for only in chosen:
        mu = math.sqrt(sum(1 / z**2 for run, z in releases if only in (None, run)))
        expected = gaussian_epsilon(noise_multiplier=1 / mu, delta=DELTA) if mu else 0
        assert ledger.spent(only, delta=DELTA) == pytest.approx(expected, rel=1e-9)


def test_a_release_without_noise_spends_everything_in_every_unit(path: Path) -> None:
    ledger = account(path)
    assert record(ledger, "a", z=0.0).epsilon is None
    record(ledger, "b", z=5.0)
    assert ledger.spent("run", delta=DELTA) == ledger.spent(delta=DELTA, unit="example") == math.inf
    with pytest.raises(PrivacyError, match="inf"):
        ledger.check(Cost(100.0), unit="client", limits=[limit(1e9)])


def test_units_are_never_added_up(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a", z=2.0, unit="client")
    record(ledger, "b", z=3.0, unit="example")
    assert ledger.spent(delta=DELTA) == gaussian_epsilon(noise_multiplier=2.0, delta=DELTA)
    assert ledger.spent(delta=DELTA, unit="example") == gaussian_epsilon(noise_multiplier=3.0, delta=DELTA)


def test_the_budget_holds_over_runs_and_to_the_last_release(path: Path) -> None:
    ledger = account(path)
    z = calibrate_noise(epsilon=8.0, delta=DELTA, releases=4)
    for number in range(4):
        ledger.check(Cost(z), unit="client", limits=[limit(8.0001)])
        record(ledger, "a", run_id=f"{number}", z=z, limits=[limit(8.0001)])
    with pytest.raises(PrivacyError, match="more noise"):
        ledger.check(Cost(z), unit="client", limits=[limit(8.0001)])
    # Also when nobody asked before.
    with pytest.raises(PrivacyError, match="the site a larger --selection-max-epsilon") as caught:
        record(ledger, "a", run_id="4", z=z, limits=[limit(8.0001)])
    assert caught.value.public_message == "this release would go beyond the site's own --selection-max-epsilon"
    assert len(ledger.entries()) == 4
    ledger.check(Cost(0.0), unit="client", limits=())


def test_a_limit_may_be_of_one_run_or_of_selection_alone(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a", None, run_id="1", z=0.0)
    ledger.check(Cost(2.0), unit="client", limits=[limit(3.0, selection_only=True), limit(3.0, run_id="2")])
    with pytest.raises(PrivacyError, match="the run's client-level epsilon to inf"):
        ledger.check(Cost(2.0), unit="client", limits=[limit(3.0, run_id="1")])
    # An adapter is no release for selection.
    ledger.check(Cost(0.0), unit="client", limits=[limit(3.0, selection_only=True)], adapter=True)
    record(ledger, "select", z=2.0)
    with pytest.raises(PrivacyError):
        ledger.check(Cost(2.0), unit="client", limits=[limit(2.5, selection_only=True)])


def test_the_same_rows_under_other_names_have_one_budget(path: Path) -> None:
    """Other runs, another order, another file: the digests alone count."""
    z = calibrate_noise(epsilon=1.2, delta=DELTA)
    rows = list(range(30))
    for number in range(5):
        random.Random(number).shuffle(rows)
        ledger = account(path, rows)
        if not number:
            record(ledger, "a", run_id="0", z=z, limits=[limit(1.2)])
            continue
        with pytest.raises(PrivacyError):
            record(ledger, "a", run_id=str(number), z=z, limits=[limit(1.2)])
        assert ledger.spent(delta=DELTA) == pytest.approx(1.2, rel=1e-6)
    assert len(Ledger(path).entries()) == 1


@pytest.mark.parametrize("unit", ["client", "example"])
def test_subsets_and_supersets_take_along_what_was_spent(path: Path, unit: str) -> None:
    def spent(rows: Sequence[object]) -> float:
        return account(path, rows).spent(delta=DELTA, unit="example" if unit == "example" else "client")

    def release(rows: Sequence[object], name: str) -> None:
        record(account(path, rows), name, z=3.0, unit=unit)

    once, twice, thrice = (gaussian_epsilon(noise_multiplier=3.0, delta=DELTA, releases=n) for n in (1, 2, 3))
    release(range(10), "all")
    assert spent(range(3)) == spent(range(20)) == once
    release(range(5), "low")
    release(range(5, 10), "high")
    # Every row was in two releases, the shard as a whole in three.
    assert spent(range(10)) == spent([4, 5]) == (thrice if unit == "client" else twice)
    release([19, "new"], "other rows")
    assert spent([19]) == once
    assert spent(["newer"]) == 0


@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(0, 7), min_size=1), st.sampled_from([2.0, 5.0])), max_size=6))
def test_every_row_has_exactly_the_releases_that_it_was_in(
    tmp_path_factory: pytest.TempPathFactory, releases: list[tuple[set[int], float]]
) -> None:
    path = tmp_path_factory.mktemp("site") / "ledger.db"
    for number, (rows, z) in enumerate(releases):
        record(account(path, sorted(rows)), str(number), z=z, unit="example")
    for row in range(8):
        mine = account(path, [row, f"fresh {row}"])
        record(mine, f"probe {row}", z=100.0, unit="example")
        mu = math.sqrt(sum(1 / z**2 for rows, z in releases if row in rows) + 1e-4)
        assert mine.spent(delta=DELTA, unit="example") == pytest.approx(
            gaussian_epsilon(noise_multiplier=1 / mu, delta=DELTA), rel=1e-9
        )


def test_a_large_shard_costs_rows_once_and_releases_a_line(path: Path) -> None:
    ledger = account(path, range(5_000))
    record(ledger, "a")
    size = path.stat().st_size
    for number in range(50):
        record(ledger, f"more {number}")
    assert path.stat().st_size - size < 50 * 1000
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT COUNT(*) FROM spends").fetchone() == (51,)


@pytest.mark.slow
def test_a_kill_between_spend_and_send_never_counts_too_low(path: Path) -> None:
    """The child spends, says so and is killed at once, again and again; or it is killed before it has said so."""
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from tests.common.test_ledger import account, record\n"
        "ledger, number = account(pathlib.Path(sys.argv[1])), int(sys.argv[3])\n"
        "while True:\n"
        "    record(ledger, f'task {number}')\n"
        "    print(number, flush=True)\n"
        "    number += 1\n"
    )
    said = 0
    for life in range(2):
        command = [sys.executable, "-c", program, str(path), os.getcwd(), str(1000 * life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            for _ in range(life + 1):
                child.stdout.readline()
                said += 1
            child.send_signal(signal.SIGKILL)
            said += len(child.stdout.read().splitlines())
        counted = account(path).spent(delta=DELTA)
        assert gaussian_epsilon(noise_multiplier=2.0, delta=DELTA, releases=said) * (1 - 1e-12) <= counted
        # At most the one that was underway was not said.
        assert counted <= gaussian_epsilon(noise_multiplier=2.0, delta=DELTA, releases=said + life + 1) * (1 + 1e-12)


@pytest.mark.slow
def test_processes_take_turns_and_lose_nothing(path: Path) -> None:
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2])\n"
        "from tests.common.test_ledger import account, record\n"
        "for number in range(5):\n"
        "    record(account(pathlib.Path(sys.argv[1]), range(int(sys.argv[3]))), f'{sys.argv[3]} {number}')\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", program, path, os.getcwd(), str(n)]) for n in (3, 6)]
    assert [child.wait() for child in children] == [0, 0]
    assert len(Ledger(path).entries()) == 10
    assert len(account(path, range(3)).entries()) == 10


def test_reading_changes_nothing(path: Path) -> None:
    record(account(path), "a")
    before = path.read_bytes()
    assert len(account(path).entries()) == 1
    account(path).spent(delta=DELTA)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", [b"garbage" * 1000, b"\x00" * 5000, b"SQLite format 3\x00" + b"x" * 5000])
def test_a_damaged_file_stops_the_site_with_advice(path: Path, damage: bytes) -> None:
    record(account(path), "a")
    path.write_bytes(damage)
    for use in (lambda: account(path).entries(), lambda: record(account(path), "b")):
        with pytest.raises(StorageError, match=r"ledger .*(restore the file from a backup|another version)"):
            use()


def test_a_ledger_of_a_later_version_is_left_alone(path: Path) -> None:
    record(account(path), "a")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StorageError, match="another version"):
        account(path).entries()


def test_a_damaged_payload_is_not_drawn_again(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE releases SET payload = x'00'")
    with pytest.raises(StorageError, match="damaged"):
        ledger.release("run", "a")


def test_only_the_owner_reads_it(path: Path) -> None:
    path.touch(mode=0o644)
    record(account(path), "a")
    assert os.stat(path).st_mode & 0o777 == 0o600
    deeper = path.parent / "new" / "ledger.db"
    record(account(deeper), "a")
    assert (os.stat(deeper).st_mode | os.stat(deeper.parent).st_mode) & 0o077 == 0


def test_it_is_durable_before_it_answers(path: Path, tmp_path: Path) -> None:
    """What strace would show; SQLite's own settings tell: the journal and its removal are synced."""
    with Ledger(path).opened(write=True) as db:
        assert db is not None
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_full_disk_is_an_error_and_leaves_the_ledger_whole(path: Path) -> None:
    ledger = account(path)
    record(ledger, "a")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        with pytest.raises(StorageError, match=r"cannot use the ledger"):
            record(ledger, "b", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.task_id for entry in ledger.entries()] == ["a"]
    record(ledger, "b")
    assert len(account(path).entries()) == 2
