"""A site of several processes under `accelerate launch`: the same features as from one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from torch.distributed import distributed_c10d

from fedhds.errors import DataError, Evicted, StorageError, TaskError
from fedhds_client.distributed.process_group import Extract, Matrix, Prepare, ProcessGroup, Stop, WorkerError
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.projection import FeatureSpace
from tests.support.extraction import DIMENSION, PAD, ROWS, SEED, llama
from tests.support.launch import launched

ROOT = Path(__file__).resolve().parents[3]


COMMANDS = (
    Prepare(b"specification"),
    Extract(3, (5, 1, 2**40), b"adapter"),
    Extract(0, (), b""),
    Stop(),
)
IDS = [7, 2, 5, 1, 0]
# What a worker raises, and what the leader makes of it. No worker can make the leader's site leave the run.
FAILURES: tuple[tuple[Exception, type[Exception], str], ...] = (
    (TaskError("not\nfinite"), TaskError, "^not\nfinite$"),
    (StorageError("no space"), StorageError, "^no space$"),
    (ValueError("no memory"), WorkerError, "^process 1 failed: ValueError: no memory$"),
    (Evicted("go"), WorkerError, "^process 1 failed: Evicted: go$"),
    (DataError("a.jsonl", "is cut"), WorkerError, "^process 1 failed: DataError: a.jsonl: is cut$"),
    (KeyError(), WorkerError, "^process 1 failed: KeyError: $"),
)


def listeners() -> set[str]:
    """Addresses at which this process and its launcher take connections."""
    processes = (psutil.Process(), psutil.Process(os.getppid()))
    return {
        entry.laddr.ip for process in processes for entry in process.net_connections("tcp") if entry.status == "LISTEN"
    }


def refuse(*_: object) -> None:
    raise AssertionError("something was pickled")


def raising(error: Exception) -> Callable[[Sequence[int]], Matrix]:
    def extract(rows: Sequence[int]) -> Matrix:
        raise error

    return extract


def flat(dimension: int, *, rows: int | None = None) -> Callable[[Sequence[int]], Matrix]:
    """Features that are the ids of the rows; `rows` is a number of rows that is not the one asked for."""

    def extract(ids: Sequence[int]) -> Matrix:
        values = np.repeat(np.asarray(ids, dtype=np.float32)[:, None], dimension, axis=1)
        return values if rows is None else np.zeros((rows, dimension), dtype=np.float32)

    return extract


def together(
    group: ProcessGroup,
    rows: Sequence[int],
    leader: Callable[[Sequence[int]], Matrix],
    worker: Callable[[Sequence[int]], Matrix],
) -> Matrix | None:
    if group.is_leader:
        return group.gather(rows, leader)
    group.contribute(rows, worker)
    return None


def follow(out: Path) -> None:
    """What each process of the group runs."""
    distributed_c10d._object_to_tensor = distributed_c10d._tensor_to_object = refuse
    group = ProcessGroup.join("cpu")
    assert group.size == 2
    assert listeners() == {"127.0.0.1"}
    for command in COMMANDS:
        if group.is_leader:
            group.broadcast(command)
        else:
            assert group.receive() == command

    model, space = llama(), FeatureSpace(SEED, DIMENSION)

    def extract(ids: Sequence[int]) -> Matrix:
        return extract_features(model, ROWS.__getitem__, ids, space, pad_id=PAD, batch_size=2).values

    whole = together(group, IDS, extract, extract)
    if whole is not None:
        np.save(out, whole)
    for rows in ([], [4]):
        whole = together(group, rows, flat(3), flat(3))
        assert whole is None or (whole.shape == (len(rows), 3) and whole[:, 0].tolist() == rows)

    # The leader learns what went wrong elsewhere, and the group goes on.
    own = raising(TaskError("the leader's own"))
    faults = [(flat(3), raising(error), kind, words) for error, kind, words in FAILURES]
    faults += [(own, raising(TaskError("the worker's")), TaskError, "the leader's own"), (own, flat(3), TaskError, "")]
    faults += [(flat(3), wrong, WorkerError, "sent features of") for wrong in (flat(1), flat(4), flat(3, rows=1))]
    for leader, worker, kind, words in faults:
        with pytest.raises(kind, match=words) if group.is_leader else nullcontext():
            together(group, IDS, leader, worker)
    whole = together(group, IDS, flat(2), flat(2))
    assert whole is None or whole[:, 0].tolist() == IDS
    group.close()


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_learn_of_each_others_errors(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}\n"
        "from pathlib import Path\n"
        "from tests.client.distributed.test_process_group import follow\n"
        f"follow(Path({str(tmp_path / 'features.npy')!r}))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launched([str(script)]), capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 1: no memory" in done.stderr
    alone = extract_features(llama(), ROWS.__getitem__, IDS, FeatureSpace(SEED, DIMENSION), pad_id=PAD, batch_size=2)
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), alone.values, rtol=1e-4, atol=1e-5)


def test_a_group_of_one_needs_no_launcher_and_no_torch() -> None:
    script = (
        "import sys; import numpy as np\n"
        "from fedhds.errors import TaskError\n"
        "from fedhds_client.distributed.process_group import ProcessGroup, Stop\n"
        "group = ProcessGroup.join('cpu')\n"
        "assert (group.is_leader, group.size) == (True, 1)\n"
        "assert group.gather([4, 5], lambda rows: np.array([rows], dtype=np.float32).T).tolist() == [[4], [5]]\n"
        "group.broadcast(Stop()); group.close()\n"
        "assert not {'torch', 'accelerate'} & set(sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match="no memory"):
        ProcessGroup(0, 1).gather([4], raising(ValueError("no memory")))
