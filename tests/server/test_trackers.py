"""Trackers: what their own readers find is what happened, each once, over restarts and while a service is away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedhds.spec import RunSpec
from fedhds_server.observers import TRACKERS, ObserverContext, Tracker
from fedhds_server.run.state import ClosedRound, Evaluation, MetricSum, Phase
from fedhds_server.settings import ServerSettings

SPEC = RunSpec.of(model="m", rounds=3, lora_rank=4)
Scalars = Counter[tuple[str, int, float]]
EXPECTED: Scalars = Counter(
    [
        *((f"round/{name}", number, value) for number in (1, 2) for name, value in (("sites", 2.0), ("rows", 12.0))),
        *((f"round/{name}", number, value) for number in (1, 2) for name, value in (("seconds", 3.0),)),
        *(("round/bytes_received", number, 640.0) for number in (1, 2)),
        *(("round/training_loss", number, 0.5) for number in (1, 2)),
        *((f"evaluation/{site}/loss", number, 0.25) for number in (0, 2) for site in ("e", "f")),
        *(("evaluation/mean/loss", number, 0.25) for number in (0, 2)),
    ]
)


def closed(number: int) -> ClosedRound:
    return ClosedRound(
        round_number=number,
        cohort=["a", "b"],
        contributions={"a": 8, "b": 4},
        loss=0.5,
        seconds=3.0,
        bytes_received=640,
    )


def evaluation() -> Evaluation:
    return Evaluation(rows=4, metrics={"loss": MetricSum(value_sum=1.0, weight=4.0)})


def tell(tracker: Tracker, rounds: int = 2, *, restarted: bool = False) -> None:
    """What a coordinator tells up to a round; after a restart first what was before."""
    tracker.started("run-1", [closed(1)] if restarted else [])
    for site in "ef":
        tracker.evaluated(0, site, evaluation())
    for number in range(2 if restarted else 1, rounds + 1):
        tracker.round_closed(closed(number))


def finish(tracker: Tracker) -> None:
    for site in "ef":
        tracker.evaluated(2, site, evaluation())
    tracker.ended(Phase.COMPLETED, "")
    tracker.closed()


def tensorboard_scalars(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found: Scalars = Counter()
    for file in (folder / "tensorboard" / "run-1").iterdir():
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                found[value.tag, event.step, value.simple_value] += 1
    return found


def mlflow_scalars(folder: Path) -> Scalars:
    client, run = mlflow_run(folder)
    keys = run.data.metrics
    return Counter((key, at.step, at.value) for key in keys for at in client.get_metric_history(run.info.run_id, key))


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(tracking_uri=(folder / "mlruns").absolute().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("fedhds").experiment_id])
    return client, run


def wandb_scalars(folder: Path) -> Scalars:
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    found: Scalars = Counter()
    for file in folder.rglob("*.wandb"):
        for data in records(file.read_bytes()):
            record = protocol.Record()
            record.ParseFromString(data)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key, value in items.items():
                if not key.startswith("_") and key != "round":
                    found[key, json.loads(items["round"]), json.loads(value)] += 1
    return found


def records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's form: blocks of 32 KiB, the first behind a head of 7 bytes."""
    place, whole = 7, b""
    while place + 7 <= len(content):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


READERS: dict[str, Callable[[Path], Scalars]] = {
    "tensorboard": tensorboard_scalars,
    "mlflow": mlflow_scalars,
    "wandb": wandb_scalars,
}


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Tracker]:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return lambda name: TRACKERS[name](ObserverContext(tmp_path, SPEC))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "tensorboard")) for name in TRACKERS]
)
def test_a_run_with_a_restart_is_there_once(name: str, make: Callable[[str], Tracker], tmp_path: Path) -> None:
    before = make(name)
    tell(before, 1)
    # The process dies here; the next one hears of all again.
    if name != "wandb":
        del before
    else:
        before.closed()
    after = make(name)
    tell(after, restarted=True)
    finish(after)
    found = READERS[name](tmp_path)
    assert {key: count for key, count in found.items() if key[0] != "parameters"} == EXPECTED


def test_a_record_that_a_crash_cut_short_is_written_again(make: Callable[[str], Tracker], tmp_path: Path) -> None:
    tell(make("tensorboard"), 1)
    (file,) = (tmp_path / "tensorboard" / "run-1").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    after = make("tensorboard")
    tell(after, restarted=True)
    finish(after)
    found = tensorboard_scalars(tmp_path)
    assert {key: count for key, count in found.items() if key[0] != "parameters"} == EXPECTED


def test_mlflow_has_the_settings_and_the_end(make: Callable[[str], Tracker], tmp_path: Path) -> None:
    tracker = make("mlflow")
    tell(tracker)
    assert mlflow_run(tmp_path)[1].info.status == "RUNNING"
    finish(tracker)
    _, run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["lora_rank"] == "4"


@pytest.mark.slow
def test_tensorboard_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedhds_server.observers import *; from fedhds.spec import RunSpec; "
        f"own = TRACKERS['tensorboard'](ObserverContext(Path({str(tmp_path)!r}), RunSpec.of(model='m', rounds=1))); "
        "own.started('run-1', []); own.closed(); "
        "print([name for name in ('torch', 'tensorflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert any(tag == "parameters" for tag, _, _ in tensorboard_scalars(tmp_path))


class Away(Tracker):
    """A service that does not answer for a while."""

    package = "json"

    def __init__(self, context: ObserverContext) -> None:
        super().__init__(context)
        self.away = True
        self.written: list[tuple[int, Mapping[str, float]]] = []

    def open(self, parameters: Mapping[str, str]) -> None:
        if self.away:
            raise ConnectionError("nobody is there")

    def write(self, round_number: int, scalars: Mapping[str, float]) -> None:
        if self.away:
            raise ConnectionError("nobody is there")
        self.written.append((round_number, scalars))


def test_a_service_that_is_away_is_said_once_and_gets_all_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Away(ObserverContext(tmp_path, SPEC))
    tell(tracker)
    assert caplog.text.count("does not take what is tracked (ConnectionError: nobody is there)") == 1
    tracker.away = False
    finish(tracker)
    assert [number for number, scalars in tracker.written if "round/rows" in scalars] == [1, 2]
    assert {name: 1 for _, scalars in tracker.written for name in scalars} == {name: 1 for name, _, _ in EXPECTED}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("tensorbord", "no tracker 'tensorbord'"),
        ("mlflow", r"mlflow needs its package: pip install 'fedhds\[mlflow\]'"),
    ],
)
def test_a_tracker_that_is_not_there_is_said_at_the_start(
    value: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=fault):
        ServerSettings(run=SPEC, track=(value,))


def test_several_trackers_are_named_at_once() -> None:
    assert ServerSettings(run=SPEC, track=("tensorboard,mlflow", "tensorboard")).track == ("tensorboard", "mlflow")
