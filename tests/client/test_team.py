"""A site of several processes under `accelerate launch`: the same features as from one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from fedhds_client.features import Features, extract_features
from fedhds_client.space import FeatureSpace
from fedhds_client.team import Extract, Stop, Team
from tests.client.test_features import DIMENSION, PAD, ROWS, SEED, llama

ROOT = Path(__file__).resolve().parents[2]


def follow(out: Path) -> None:
    """What each process of the team runs."""
    team = Team.joined("cpu")
    assert team.size == 2
    order = team.order(Extract(3, (0, 1), b"adapter") if team.leads else None)
    assert order == Extract(3, (0, 1), b"adapter")
    ids = [7, 2, 5, 1, 0]
    space = FeatureSpace(SEED, DIMENSION)
    part = extract_features(llama(), ROWS.__getitem__, team.share(ids), space, pad_id=PAD, batch_size=2)
    whole = team.gathered(part)
    if whole is not None:
        np.savez(out, ids=whole.ids, values=whole.values)
    nothing = team.gathered(Features(part.ids[:0], part.values[:0]))
    assert (nothing is not None) == team.leads
    # The leader hears what went wrong elsewhere.
    with pytest.raises(ValueError, match="no memory") if team.leads else nullcontext():
        team.gathered(ValueError("no memory") if not team.leads else part)
    assert isinstance(team.order(Stop() if team.leads else None), Stop)
    team.dissolved()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launched(command: list[str]) -> list[str]:
    """A command for two processes; --multi_gpu is accelerate's word for several, also on a machine without a GPU."""
    flags = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        *flags,
        f"--main_process_port={free_port()}",
        *command,
    ]


def test_two_processes_give_what_one_gives_and_hear_of_each_others_errors(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(ROOT), *sys.path]!r}\n"
        "from pathlib import Path\n"
        "from tests.client.test_team import follow\n"
        f"follow(Path({str(tmp_path / 'found.npz')!r}))\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launched([str(script)]), capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.load(tmp_path / "found.npz")
    ids = [7, 2, 5, 1, 0]
    alone = extract_features(llama(), ROWS.__getitem__, ids, FeatureSpace(SEED, DIMENSION), pad_id=PAD, batch_size=2)
    assert found["ids"].tolist() == ids
    np.testing.assert_allclose(found["values"], alone.values, rtol=1e-4, atol=1e-5)


def test_a_team_of_one_needs_no_launcher() -> None:
    team = Team.joined("cpu")
    assert (team.leads, team.size) == (True, 1)
    assert team.share([4, 5, 6]) == [4, 5, 6]
    part = Features(np.array([4, 5]), np.zeros((2, 3), dtype=np.float32))
    whole = team.gathered(part)
    assert whole is not None
    assert whole.ids.tolist() == [4, 5]
    with pytest.raises(ValueError, match="no memory"):
        team.gathered(ValueError("no memory"))
