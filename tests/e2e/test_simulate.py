"""`fedhds simulate`: real sweeps, killed and started again, and one that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import BIN, processes_of
from tests.support.tiny import make_model, write_rows

pytestmark = pytest.mark.e2e

PATIENCE_S = 300.0
SMALL = ("--max-length=256", "--max-new-tokens=4", "--lora-rank=2", "--processes=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", {"a": 20, "b": 20, "c": 6})


def command(out: Path, *flags: object) -> list[str]:
    return [str(BIN / "fedhds"), "simulate", f"--out={out}", *map(str, flags)]


def lines(out: Path) -> list[dict[str, Any]]:
    path = out / "runs.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_a_sweep_that_is_killed_and_started_again_gives_the_same_results(
    tmp_path: Path, model: Path, rows: Path
) -> None:
    flags = [f"--model={model}", f"--data={rows}", "--sites=3", "--alpha=5", "--unseen=c", "--rounds=2", *SMALL]
    first_run = [*flags, "--selection-strategy=random"]
    flags.append("--selection-strategy=random,full")
    whole = subprocess.run(command(tmp_path / "whole", *first_run), capture_output=True, text=True, timeout=PATIENCE_S)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "unseen loss" in whole.stdout
    assert (tmp_path / "whole" / "results.png").exists()

    out = tmp_path / "killed"
    with subprocess.Popen(command(out, *flags), stdout=subprocess.DEVNULL) as first:
        run = out / "runs"
        until(lambda: [*run.glob("*random*/run/metrics.jsonl")] and _rounds(run) >= 1, "a round closes")
        first.kill()
    until(lambda: not processes_of(out), "the daemons end with the simulation")
    assert lines(out) == []
    again = subprocess.run(command(out, *flags), capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line["settings"] for line in lines(out)] == [{"selection_strategy": name} for name in ("random", "full")]
    assert lines(out)[0]["result"] == lines(tmp_path / "whole")[0]["result"]
    assert [line["measured"]["starts"] for line in lines(out)] == [2, 1]

    before = (out / "runs.jsonl").read_bytes()
    finished = subprocess.run(command(out, *flags), capture_output=True, text=True, timeout=PATIENCE_S)
    assert (finished.returncode, (out / "runs.jsonl").read_bytes()) == (0, before)
    assert "2 of 2 runs are finished" in finished.stdout


def _rounds(runs: Path) -> int:
    texts = [path.read_text() for path in runs.glob("*random*/run/metrics.jsonl")]
    return sum('"event": "round"' in text for text in texts)


def test_a_run_with_tls_that_fails_is_told_and_kept(tmp_path: Path, rows: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "a.jsonl").write_bytes(rows.read_bytes())
    out = tmp_path / "out"
    flags = ("--tls", f"--model={tmp_path / 'none'}", f"--shards={shards}", *SMALL)
    done = subprocess.run(command(out, *flags), capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "1 of 1 runs failed; the same command tries them again" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    [folder] = (out / "runs").iterdir()
    assert folder.name.endswith(".failed")
    assert str(folder / "logs" / "a.log") in done.stdout
    assert (folder / "certs" / "a.key").exists()
    assert lines(out) == []


def test_ctrl_c_ends_all_and_says_how_to_go_on(tmp_path: Path, model: Path, rows: Path) -> None:
    out = tmp_path / "out"
    flags = (f"--model={model}", f"--data={rows}", "--sites=2", "--alpha=5", "--rounds=500", *SMALL)
    # Of tests that run in a shell's background, the signal is ignored, and so it would be here.
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command(out, *flags), stdout=subprocess.PIPE, text=True, preexec_fn=heeds) as simulation:
        until(lambda: len(processes_of(out / "runs")) > 1, "the daemons run")
        simulation.send_signal(signal.SIGINT)
        text, _ = simulation.communicate(timeout=PATIENCE_S)
    assert simulation.returncode == 130
    assert "stopped; the same command goes on" in text
    until(lambda: not processes_of(out), "the daemons end")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data=none.jsonl", "--model=m"), "none.jsonl"),
        (("--shards=none", "--model=m"), "--shards: none is no folder"),
        (("--model=m",), "--data: give either --data, or --shards"),
        (("--data=rows.jsonl",), "--model"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    done = subprocess.run(command(tmp_path / "out", *flags), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
