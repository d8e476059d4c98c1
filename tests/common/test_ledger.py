"""The ledger: durable before it answers, whole after a crash, and never short of what was spent."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import PrivacyError, StorageError
from fedhds.privacy.ledger import Entry, Ledger
from fedhds.privacy.mechanisms import calibrate_noise, gaussian_epsilon

DELTA = 1e-5


def record(ledger: Ledger, task_id: str, payload: bytes = b"bytes", *, run_id: str = "run", z: float = 2.0) -> Entry:
    return ledger.record(
        payload,
        run_id=run_id,
        task_id=task_id,
        noise_multiplier=z,
        sensitivity=40.0,
        clip_norm=5.0,
        released=16,
        dimension=2,
        delta=DELTA,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_a_new_ledger_is_empty_and_leaves_no_trace(path: Path) -> None:
    ledger = Ledger(path)
    assert ledger.entries() == []
    assert ledger.release("run", "task") is None
    assert ledger.spent(delta=DELTA) == 0
    assert not list(path.parent.iterdir())


def test_an_entry_says_what_was_released(path: Path) -> None:
    record(Ledger(path), "select/0/a")
    line = json.loads(path.read_text())
    assert line["time"].endswith("+00:00")
    assert line["epsilon"] == gaussian_epsilon(noise_multiplier=2.0, delta=DELTA)
    del line["time"], line["epsilon"], line["digest"]
    assert line == {
        "run_id": "run",
        "task_id": "select/0/a",
        "release": "centroids",
        "mechanism": "gaussian",
        "noise_multiplier": 2.0,
        "sensitivity": 40.0,
        "clip_norm": 5.0,
        "released": 16,
        "dimension": 2,
        "delta": DELTA,
        "unit": "client",
    }


def test_a_restart_finds_the_same_bytes_and_the_same_spending(path: Path) -> None:
    ledger = Ledger(path)
    record(ledger, "a", b"\x00first\n", z=2.0)
    record(ledger, "b", b"", z=3.0)
    again = Ledger(path)
    assert (again.release("run", "a"), again.release("run", "b")) == (b"\x00first\n", b"")
    assert again.release("run", "c") is None
    assert again.release("another run", "a") is None
    assert again.entries() == ledger.entries()
    assert again.spent(delta=DELTA) == ledger.spent(delta=DELTA) > 0


def test_one_task_releases_once(path: Path) -> None:
    ledger = Ledger(path)
    record(ledger, "a", b"first")
    with pytest.raises(PrivacyError, match="twice"):
        record(ledger, "a", b"second")
    assert ledger.release("run", "a") == b"first"
    assert len(ledger.entries()) == 1


def test_the_same_task_id_in_another_run_is_another_release(path: Path) -> None:
    ledger = Ledger(path)
    record(ledger, "a", b"one", run_id="1")
    record(ledger, "a", b"two", run_id="2")
    assert (ledger.release("1", "a"), ledger.release("2", "a")) == (b"one", b"two")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.floats(0.1, 100)), max_size=8))
def test_spending_composes_over_all_releases_or_those_of_a_run(
    tmp_path_factory: pytest.TempPathFactory, releases: list[tuple[str, float]]
) -> None:
    ledger = Ledger(tmp_path_factory.mktemp("site") / "ledger.jsonl")
    for number, (run_id, z) in enumerate(releases):
        record(ledger, f"{number}", run_id=run_id, z=z)
    chosen: list[str | None] = [None, "x", "y"]
    for only in chosen:
        mu = math.sqrt(sum(1 / z**2 for run, z in releases if only in (None, run)))
        expected = gaussian_epsilon(noise_multiplier=1 / mu, delta=DELTA) if mu else 0
        assert ledger.spent(only, delta=DELTA) == pytest.approx(expected, rel=1e-9)


def test_a_release_without_noise_spends_everything(path: Path) -> None:
    ledger = Ledger(path)
    assert record(ledger, "a", z=0.0).epsilon is None
    record(ledger, "b", z=5.0)
    assert ledger.spent("run", delta=DELTA) == math.inf
    assert ledger.entries()[0].mechanism == "none"
    with pytest.raises(PrivacyError, match="inf"):
        ledger.check(max_epsilon=1e9, noise_multiplier=100.0, delta=DELTA)


def test_the_budget_holds_over_runs_and_to_the_last_release(path: Path) -> None:
    ledger = Ledger(path)
    z = calibrate_noise(epsilon=8.0, delta=DELTA, releases=4)
    for number in range(4):
        ledger.check(max_epsilon=8.0001, noise_multiplier=z, delta=DELTA)
        record(ledger, "a", run_id=f"{number}", z=z)
    with pytest.raises(PrivacyError, match="more noise"):
        ledger.check(max_epsilon=8.0001, noise_multiplier=z, delta=DELTA)
    ledger.check(max_epsilon=None, noise_multiplier=0.0, delta=DELTA)


def test_a_crash_in_an_append_leaves_what_was_there_and_spends_nothing(path: Path) -> None:
    record(Ledger(path), "a")
    first = path.read_bytes()
    record(Ledger(path), "b")
    second = path.read_bytes()[len(first) :]
    for kept in range(len(second)):
        path.write_bytes(first + second[:kept])
        ledger = Ledger(path)
        assert [entry.task_id for entry in ledger.entries()] == ["a"]
        assert ledger.release("run", "b") is None
        record(ledger, "b", b"drawn again")
        assert [entry.task_id for entry in Ledger(path).entries()] == ["a", "b"]
        assert Ledger(path).release("run", "b") == b"drawn again"


def test_reading_changes_nothing(path: Path) -> None:
    record(Ledger(path), "a")
    torn = path.read_bytes() + b'{"time": "20'
    path.write_bytes(torn)
    assert len(Ledger(path).entries()) == 1
    assert path.read_bytes() == torn


@pytest.mark.parametrize("damage", [b"garbage", b"\x00\x00", b"", b'{"time": "x"}', b"[]"])
@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_line_stops_the_site_with_advice(path: Path, damage: bytes, line: int) -> None:
    for task_id in "ab":
        record(Ledger(path), task_id)
    lines = path.read_bytes().splitlines()
    lines[line] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StorageError, match=f"line {line + 1} .* restore the file from a backup"):
        Ledger(path)


@pytest.mark.parametrize("field", ["noise_multiplier", "unit", "epsilon", "task_id"])
def test_a_line_that_lacks_or_adds_something_is_damaged(path: Path, field: str) -> None:
    record(Ledger(path), "a")
    whole: dict[str, Any] = json.loads(path.read_text())
    for changed in ({**whole, f"new_{field}": 1}, {**whole, field: []}):
        path.write_text(json.dumps(changed) + "\n")
        with pytest.raises(StorageError, match="damaged"):
            Ledger(path)


def test_a_damaged_or_lost_payload_is_not_drawn_again(path: Path) -> None:
    ledger = Ledger(path)
    record(ledger, "a")
    (file,) = path.with_suffix(".releases").iterdir()
    file.write_bytes(b"other")
    with pytest.raises(StorageError, match="damaged"):
        ledger.release("run", "a")
    file.unlink()
    with pytest.raises(StorageError, match="cannot read"):
        ledger.release("run", "a")


def test_only_the_owner_reads_it(path: Path) -> None:
    path.touch(mode=0o644)
    record(Ledger(path), "a")
    (payload,) = path.with_suffix(".releases").iterdir()
    assert [os.stat(file).st_mode & 0o777 for file in (path, payload)] == [0o600, 0o600]
    assert os.stat(payload.parent).st_mode & 0o077 == 0


def test_bytes_and_entry_are_on_disk_in_that_order_before_it_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    record(Ledger(path), "a")
    made, payload, *rest = synced
    assert made == path.parent.name
    assert payload.endswith(".partial")
    assert rest == ["ledger.releases", "ledger.jsonl", path.parent.name]


def test_a_full_disk_is_an_error_and_leaves_the_ledger_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)
    record(ledger, "a")
    before = path.read_bytes()
    write = os.pwrite
    calls = 0

    def full(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:10], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match="No space left"):
            record(ledger, "b")
    assert path.read_bytes() == before
    record(ledger, "b")
    assert len(Ledger(path).entries()) == 2


def test_task_ids_name_no_path(path: Path) -> None:
    ledger = Ledger(path)
    record(ledger, "../../escape", b"x")
    assert ledger.release("run", "../../escape") == b"x"
    assert {file.name for file in path.parent.iterdir()} == {"ledger.jsonl", "ledger.releases"}
