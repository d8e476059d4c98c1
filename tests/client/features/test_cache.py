"""Cached features: what extraction would give, asked for no row twice, whatever happened to the files meanwhile."""

from __future__ import annotations

import hmac
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import TaskError
from fedhds_client.features.cache import cached_features
from fedhds_client.features.extraction import Features

DIMENSION = 3
Row = tuple[int, ...]

rows = st.lists(st.lists(st.integers(0, 2**40), min_size=1, max_size=4).map(tuple), max_size=12)


def features_of(row: Row, dimension: int) -> npt.NDArray[np.float32]:
    """Full-width float32 values that follow from the tokens alone."""
    return np.random.default_rng(row).standard_normal(dimension).astype(np.float32)


@dataclass
class Desk:
    """A shard in front of a cache; remembers which rows were computed and what the cache had to say."""

    folder: Path
    shard: Sequence[Row]
    key: str = "adapter 1"
    dimension: int = DIMENSION
    asked: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def extract(self, ids: Sequence[int]) -> Features:
        self.asked += [self.shard[row] for row in ids]
        values = [features_of(self.shard[row], self.dimension) for row in ids]
        return Features(np.asarray(ids, dtype=np.int64), np.array(values, np.float32).reshape(-1, self.dimension))

    def take(self, ids: Sequence[int] | None = None) -> Features:
        return cached_features(
            self.folder,
            key=self.key,
            encode=lambda row: self.shard[row],
            ids=range(len(self.shard)) if ids is None else ids,
            dimension=self.dimension,
            extract=self.extract,
            note=self.notes.append,
        )

    def take_right(self) -> Desk:
        """Takes the whole shard's features and compares them with uncached ones."""
        found, right = self.take(), Desk(self.folder, self.shard, dimension=self.dimension).extract
        assert_equal(found, right(range(len(self.shard))))
        return self


def assert_equal(found: Features, right: Features) -> None:
    assert found.ids.dtype == right.ids.dtype
    assert found.values.dtype == right.values.dtype
    np.testing.assert_array_equal(found.ids, right.ids)
    np.testing.assert_array_equal(found.values, right.values)
    assert found.values.shape == right.values.shape


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.features"))


def only_file(folder: Path) -> Path:
    (file,) = files(folder)
    return file


@contextmanager
def fresh_folder() -> Iterator[Path]:
    """For hypothesis, whose examples share one `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "cache"


SHARD: list[Row] = [(5, 6), (7,), (8, 9, 10), (11,)]


@settings(max_examples=60, deadline=None)
@given(rows, rows, st.randoms(use_true_random=False))
def test_after_any_change_of_the_shard_exactly_the_rows_not_seen_before_are_computed_once(
    before: list[Row], added: list[Row], random: Random
) -> None:
    after = [*random.sample(before, len(before) // 2), *added, *added[:2]]
    random.shuffle(after)
    with fresh_folder() as folder:
        assert sorted(Desk(folder, before).take_right().asked) == sorted(set(before))
        changed = Desk(folder, after).take_right()
        assert sorted(changed.asked) == sorted(set(after) - set(before))
        # Rows that left the shard left the file; those that are in it stayed.
        again = Desk(folder, [*before, *after]).take_right()
        assert sorted(again.asked) == sorted(set(before) - set(after))
        assert not changed.notes
        assert not again.notes


def test_the_same_shard_is_computed_once_and_not_even_written_again(tmp_path: Path) -> None:
    assert Desk(tmp_path, SHARD).take_right().asked == SHARD
    written = only_file(tmp_path).stat().st_ino
    assert Desk(tmp_path, SHARD[::-1]).take_right().asked == []
    assert only_file(tmp_path).stat().st_ino == written


def test_one_changed_row_is_the_only_one_computed(tmp_path: Path) -> None:
    for changed in [(8, 9), (8, 9, 10, 0), (10, 9, 8), (8, 910), (8, 9, 10 + 2**32)]:
        Desk(tmp_path, SHARD).take_right()
        assert Desk(tmp_path, [*SHARD[:2], changed, SHARD[3]]).take_right().asked == [changed]


def test_equal_rows_are_computed_and_kept_once(tmp_path: Path) -> None:
    assert Desk(tmp_path, [(1,), (2,), (1,), (1,), (2,)]).take_right().asked == [(1,), (2,)]
    size = only_file(tmp_path).stat().st_size
    Desk(tmp_path, [(1,), (2,)]).take_right()
    assert only_file(tmp_path).stat().st_size == size


def test_ids_come_back_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    desk = Desk(tmp_path, SHARD)
    for ids in [(2, 0), (3, 2, 1, 2), (0, 1, 2, 3)]:
        assert_equal(desk.take(ids), Desk(tmp_path, SHARD).extract(ids))


def test_an_empty_shard_has_no_features_and_computes_none(tmp_path: Path) -> None:
    for _ in range(2):
        desk = Desk(tmp_path, [])
        assert desk.take().values.shape == (0, DIMENSION)
        assert desk.take().ids.dtype == np.int64
        assert not desk.asked
        assert not desk.notes
    assert Desk(tmp_path, SHARD).take_right().asked == SHARD


def test_a_shard_of_many_blocks_comes_back_as_it_was(tmp_path: Path) -> None:
    wide = 100_000
    shard = [(row,) for row in range(7)]
    Desk(tmp_path, shard, dimension=wide).take_right()
    assert Desk(tmp_path, [*shard[3:], (99,), shard[0]], dimension=wide).take_right().asked == [(99,)]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed_and_repaired(data: st.DataObject) -> None:
    with fresh_folder() as folder:
        Desk(folder, SHARD).take_right()
        file = only_file(folder)
        content = bytearray(file.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        assert_rebuilt(folder)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_truncated_or_longer_file_is_noticed_and_repaired(data: st.DataObject) -> None:
    with fresh_folder() as folder:
        Desk(folder, SHARD).take_right()
        file = only_file(folder)
        content = file.read_bytes()
        cut = content[: data.draw(st.integers(0, len(content) - 1))]
        file.write_bytes(data.draw(st.sampled_from([cut, content + b"\0", content + content])))
        assert_rebuilt(folder)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=300))
def test_any_other_content_is_noticed_and_repaired(content: bytes) -> None:
    with fresh_folder() as folder:
        Desk(folder, SHARD).take_right()
        only_file(folder).write_bytes(content)
        assert_rebuilt(folder)


def assert_rebuilt(folder: Path) -> None:
    desk = Desk(folder, SHARD).take_right()
    assert desk.asked == SHARD
    assert len(desk.notes) == 1
    assert "taken again" in desk.notes[0]
    repaired = Desk(folder, SHARD).take_right()
    assert not repaired.asked
    assert not repaired.notes


def test_a_file_of_another_dimension_is_replaced(tmp_path: Path) -> None:
    Desk(tmp_path, SHARD, dimension=DIMENSION + 1).take_right()
    assert_rebuilt(tmp_path)


def test_a_file_of_another_format_is_replaced_though_its_checksum_is_right(tmp_path: Path) -> None:
    Desk(tmp_path, SHARD).take_right()
    file = only_file(tmp_path)
    content = bytearray(file.read_bytes()[:-32])
    content[7] += 1
    checksum = hmac.digest((tmp_path / "secret").read_bytes(), file.name.encode() + content, "sha256")
    file.write_bytes(content + checksum)
    assert_rebuilt(tmp_path)


def test_a_file_copied_to_another_key_is_not_taken_for_that_keys(tmp_path: Path) -> None:
    Desk(tmp_path, SHARD).take_right()
    first = only_file(tmp_path)
    Desk(tmp_path, SHARD, key="adapter 2").take_right()
    (second,) = set(files(tmp_path)) - {first}
    second.replace(first)
    assert_rebuilt(tmp_path)


@pytest.mark.parametrize("secret", [b"", b"\0" * 31, b"\0" * 32])
def test_a_lost_secret_costs_one_extraction(tmp_path: Path, secret: bytes) -> None:
    Desk(tmp_path, SHARD).take_right()
    (tmp_path / "secret").write_bytes(secret)
    desk = Desk(tmp_path, SHARD).take_right()
    assert desk.asked == SHARD
    assert desk.notes
    assert len((tmp_path / "secret").read_bytes()) == 32
    assert not Desk(tmp_path, SHARD).take_right().asked


def test_no_token_is_on_disk_and_hashes_differ_between_folders(tmp_path: Path) -> None:
    shard: list[Row] = [(0x1122334455667788, token) for token in range(20)]
    hashes = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        Desk(folder, shard).take_right()
        for file in folder.iterdir():
            for order in ("<i8", ">i8", "<i4", ">i4"):
                assert np.array([0x1122334455667788]).astype(order).tobytes() not in file.read_bytes()
        content = only_file(folder).read_bytes()
        start = len(content) - 32 - len(shard) * (32 + 4 * DIMENSION)
        hashes.append({content[place : place + 32] for place in range(start, start + 32 * len(shard), 32)})
    assert [len(found) for found in hashes] == [len(shard)] * 2
    assert not hashes[0] & hashes[1]


def test_only_the_owner_may_read_the_folder_and_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "site" / "cache"
    before = os.umask(0)
    try:
        Desk(folder, SHARD).take_right()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert len(modes) >= 2
    assert set(modes.values()) == {0o600}


def test_the_two_files_used_last_are_kept(tmp_path: Path) -> None:
    def take(key: str) -> list[Row]:
        return Desk(tmp_path, SHARD, key=key).take_right().asked

    assert take("a")
    assert take("b")
    assert not take("a")
    assert take("c")
    assert len(files(tmp_path)) == 2
    # Used after b, so kept; looked at first, as b's return costs one of the others.
    assert not take("a")
    assert not take("c")
    assert take("b")
    assert len(files(tmp_path)) == 2


def test_a_folder_that_cannot_be_used_is_noted_and_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    desk = Desk(tmp_path / "file" / "cache", SHARD).take_right()
    assert desk.asked == SHARD
    assert len(desk.notes) == 1
    assert "Not a directory" in desk.notes[0]


def test_a_file_that_can_be_neither_read_nor_replaced_is_noted_and_work_goes_on(tmp_path: Path) -> None:
    Desk(tmp_path, SHARD).take_right()
    file = only_file(tmp_path)
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    desk = Desk(tmp_path, SHARD).take_right()
    assert desk.asked == SHARD
    assert ["cannot read" in note for note in desk.notes] == [True, False]
    assert ["cannot keep" in note for note in desk.notes] == [False, True]


@pytest.mark.slow
def test_on_a_full_disk_the_features_are_given_and_the_earlier_file_is_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: writing fails midway, as it does there."""
    Desk(tmp_path, SHARD).take_right()
    script = f"""
import resource
from pathlib import Path
from tests.client.features.test_cache import Desk, SHARD
resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
desk = Desk(Path({str(tmp_path)!r}), [*SHARD, (77,)]).take_right()
assert desk.asked == [(77,)], desk.asked
fresh = Desk(Path({str(tmp_path)!r}) / "fresh", SHARD).take_right()
assert fresh.asked == SHARD, fresh.asked
for note in [*desk.notes, *fresh.notes]:
    print(note)
"""
    first, second = run(script).splitlines()
    assert "cannot keep features" in first
    assert "cannot keep features" in second
    assert not list(tmp_path.rglob("*.partial"))
    survived = Desk(tmp_path, SHARD).take_right()
    assert not survived.asked
    assert not survived.notes


def test_what_a_crash_leaves_of_a_write_does_no_harm(tmp_path: Path) -> None:
    Desk(tmp_path, SHARD).take_right()
    left = [tmp_path / f"{name}.partial" for name in (only_file(tmp_path).name, "another key's.features")]
    for partial in left:
        partial.write_bytes(b"\1" * 10_000)
    more = Desk(tmp_path, [*SHARD, (77,)]).take_right()
    assert more.asked == [(77,)]
    assert not more.notes
    assert not any(partial.exists() for partial in left)
    assert not Desk(tmp_path, [*SHARD, (77,)]).take_right().notes


@pytest.mark.parametrize("error", [TaskError("diverged"), OSError("the shard's disk"), ValueError("no tokens")])
def test_errors_of_the_extraction_pass_through_and_leave_the_cache_as_it_was(tmp_path: Path, error: Exception) -> None:
    Desk(tmp_path, SHARD).take_right()
    before = only_file(tmp_path).read_bytes()

    class Failing(Desk):
        def extract(self, ids: Sequence[int]) -> Features:
            raise error

    with pytest.raises(type(error)) as caught:
        Failing(tmp_path, [*SHARD, (77,)]).take()
    assert caught.value is error
    assert only_file(tmp_path).read_bytes() == before


def test_features_of_other_rows_than_asked_for_are_refused_and_not_kept(tmp_path: Path) -> None:
    class Shuffling(Desk):
        def extract(self, ids: Sequence[int]) -> Features:
            return super().extract(ids[::-1])

    class Narrow(Desk):
        def extract(self, ids: Sequence[int]) -> Features:
            found = super().extract(ids)
            return Features(found.ids, found.values[:, 1:])

    for wrong in (Shuffling(tmp_path, SHARD), Narrow(tmp_path, SHARD)):
        with pytest.raises(ValueError, match="4 rows in 3 dimensions"):
            wrong.take()
    assert not files(tmp_path)


def test_threads_that_share_a_folder_get_right_features_and_leave_a_sound_file(tmp_path: Path) -> None:
    shards: list[list[Row]] = [[(row,) for row in range(first, first + 200)] for first in (0, 100, 150, 5000)]
    failures: list[BaseException] = []
    notes: list[str] = []
    start = threading.Barrier(len(shards))

    def use(shard: list[Row]) -> None:
        try:
            start.wait()
            for _ in range(15):
                notes.extend(Desk(tmp_path, shard).take_right().notes)
        except BaseException as error:  # noqa: BLE001 - the test reports it
            failures.append(error)

    threads = [threading.Thread(target=use, args=(shard,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not notes
    # The file holds one writer's rows, all of them.
    kept = only_file(tmp_path).read_bytes()
    computed = []
    for shard in shards:
        only_file(tmp_path).write_bytes(kept)
        desk = Desk(tmp_path, shard).take_right()
        assert not desk.notes
        computed.append(len(desk.asked))
    assert computed.count(0) == 1


@pytest.mark.slow
def test_processes_that_share_a_folder_use_one_secret_and_corrupt_nothing(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from tests.client.features.test_cache import Desk
folder, number = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
start = float(sys.stdin.readline())
shard = [(row,) for row in range(number * 50, number * 50 + 100)]
for turn in range(20):
    time.sleep(max(0.0, start + turn / 20 - time.time()))
    print(*Desk(folder / f"new {turn}", shard, key=f"{number}").take_right().notes, end="")
for _ in range(40):
    print(*Desk(folder / "one", shard).take_right().notes, end="")
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for number in range(2)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    start = time.time() + 0.1
    for process in processes:
        assert process.stdin
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    for process in processes:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out, errors) == (0, "", "")
    for turn in range(20):
        for number in range(2):
            shard = [(row,) for row in range(number * 50, number * 50 + 100)]
            assert not Desk(tmp_path / f"new {turn}", shard, key=f"{number}").take_right().asked


def test_memory_is_one_result_and_little_more(tmp_path: Path) -> None:
    shard, wide = [(row,) for row in range(4000)], 2048
    values = np.zeros((len(shard), wide), dtype=np.float32)

    def peak() -> float:
        """In results' size; where rows are computed, the extraction's own result is one of them."""
        tracemalloc.start()
        try:
            cached_features(
                tmp_path,
                key="k",
                encode=lambda row: shard[row],
                ids=range(len(shard)),
                dimension=wide,
                extract=lambda ids: Features(np.asarray(ids, dtype=np.int64), values[: len(ids)].copy()),
                note=pytest.fail,
            )
            return tracemalloc.get_traced_memory()[1] / values.nbytes
        finally:
            tracemalloc.stop()

    assert peak() < 1.25
    assert peak() < 1.25


REPOSITORY = Path(__file__).resolve().parents[3]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(REPOSITORY / name) for name in ("common", "server", "client", "")),
}


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, cwd=REPOSITORY, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
