"""Whole runs of every PEFT method by real processes: they learn, survive kill -9 of all, and PEFT loads the result."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import BIN, processes_of
from tests.support.tiny import logits, make_model, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.long]

PATIENCE_S = 600.0
ROUNDS = 3
FLAGS = (
    "--sites=2",
    "--alpha=5",
    "--unseen=c",
    f"--rounds={ROUNDS}",
    "--evaluate-every=1",
    "--selection-strategy=full",
    "--learning-rate=0.01",
    "--max-length=256",
    "--max-new-tokens=4",
    "--processes=1",
)
METHODS: dict[str, tuple[str, ...]] = {
    "rslora": ("--lora-rank=2", "--use-rslora"),
    "dora": ("--lora-rank=2", "--use-dora", "--wire-dtype=int8"),
    "ia3": ("--peft-method=ia3",),
    "beft": ("--peft-method=beft",),
    "prompt-tuning": ("--peft-method=prompt-tuning",),
    "prefix-tuning": ("--peft-method=prefix-tuning", "--num-virtual-tokens=8"),
    "p-tuning": ("--peft-method=p-tuning", "--encoder-hidden-size=16", "--server-optimizer=momentum"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three topics, one of which nobody trains on."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", {"a": 20, "b": 20, "c": 6})


def command(out: Path, model: Path, rows: Path, flags: tuple[str, ...]) -> list[str]:
    return [str(BIN / "fedhds"), "simulate", f"--out={out}", f"--model={model}", f"--data={rows}", *FLAGS, *flags]


def run_folder(out: Path) -> Path:
    [folder] = (out / "runs").glob("*/run")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_learns_survives_and_gives_an_adapter_that_peft_loads(
    tmp_path: Path, model: Path, rows: Path, name: str
) -> None:
    whole, killed = (command(tmp_path / out, model, rows, METHODS[name]) for out in ("whole", "killed"))
    done = subprocess.run(whole, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_folder(tmp_path / "whole")
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    losses = [entry["metrics"]["loss"] for entry in report["evaluations"]]
    assert len(losses) == ROUNDS + 1
    assert losses[-1] < losses[0]

    with subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + PATIENCE_S
        # Its daemons end with it, as suddenly.
        while not [*(tmp_path / "killed").glob("runs/*/run/metrics.jsonl")]:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        first.kill()
    while processes_of(tmp_path / "killed"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = subprocess.run(killed, capture_output=True, text=True, timeout=PATIENCE_S)
    assert again.returncode == 0, again.stdout + again.stderr
    tensors = (folder / "checkpoint" / "adapter_model.safetensors").read_bytes()
    other = run_folder(tmp_path / "killed") / "checkpoint" / "adapter_model.safetensors"
    assert other.read_bytes() == tensors
    [delivered] = folder.parent.glob("sites-*/adapter/adapter_model.safetensors")
    assert delivered.read_bytes() == tensors

    # PEFT loads both folders, and the adapter counts.
    values = logits(model, folder / "checkpoint")
    assert logits(model, delivered.parent) == values
    method = json.loads((folder / "checkpoint" / "adapter_config.json").read_text())["peft_type"]
    assert method == report["spec"]["peft"]["method"].upper().replace("-", "_")
