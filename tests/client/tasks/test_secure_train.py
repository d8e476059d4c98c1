"""The task "secure-train", and sites that send no update in the clear: what a run or a task must be for them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import FedhdsError, PlainUpdateAsked, SecureAggregationError, TaskError, TooFewSites
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import secure_pb2
from fedhds_client import tasks
from fedhds_client.executor import _check_secure
from fedhds_client.state_files import file_key
from fedhds_client.tasks import TASKS, TaskContext
from fedhds_client.tasks.train import TrainTask
from fedhds_client.updates.update import FinishedUpdate, UpdateMetadata
from tests.support.secure_rounds import LOSS, SecureRun, certificates

SECURE = RunSpec.of(model="m", rounds=1, secure_aggregation=True)
PLAIN = RunSpec.of(model="m", rounds=1)


def settings(*, require_secure_sites: int = 0, **changed: Any) -> Any:
    folder = certificates()
    tls = {"tls_ca": folder / "ca.crt", "tls_cert": folder / "a.crt", "tls_key": folder / "a.key"}
    rules = SimpleNamespace(require_secure_sites=require_secure_sites)
    return SimpleNamespace(**{"rules": rules, **tls, **changed})


@pytest.mark.parametrize(
    ("spec", "changed", "error", "reason"),
    [
        (PLAIN, {"require_secure_sites": 3}, PlainUpdateAsked, "sends updates in the clear"),
        (SECURE, {"require_secure_sites": 6}, TooFewSites, "5 certificates' sites at least"),
        (SECURE, {"tls_cert": None}, SecureAggregationError, "needs --tls-ca"),
    ],
)
def test_a_run_that_shows_this_sites_update_is_refused(
    spec: RunSpec, changed: dict[str, Any], error: type[FedhdsError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        _check_secure(settings(**changed), spec)


def test_other_runs_are_joined() -> None:
    _check_secure(settings(), PLAIN)
    _check_secure(settings(require_secure_sites=5), SECURE)


def context(folder: Path, task: pb.Task, spec: RunSpec, run: SecureRun | None = None) -> TaskContext:
    site = SimpleNamespace(name="a", folder=folder, shard=range(5))
    model = SimpleNamespace(manifest=lambda: run.manifest if run else None)
    adapter = run.store.verified(run.state.adapter) if run else folder / "adapter"
    models = SimpleNamespace(spec=spec, model=model)
    parts: Any = (task, "run", site, 0, settings(), models, adapter, SimpleNamespace())
    return TaskContext(*parts)


def test_a_task_in_the_clear_is_refused_in_a_secure_run_and_the_other_way_round(tmp_path: Path) -> None:
    task = pb.Task(id="train/1/a", kind="train", round_number=1)
    task.request.Pack(pb.TrainRequest())
    with pytest.raises(PlainUpdateAsked, match="asks for an update in the clear"):
        TASKS["train"].run(context(tmp_path, task, SECURE))
    task.request.Pack(secure_pb2.KeysRequest())
    with pytest.raises(TaskError, match="breaks its own rules"):
        TASKS["secure-train"].run(context(tmp_path, task, PLAIN))
    task.request.Pack(pb.TrainRequest())
    with pytest.raises(TaskError, match=r"fedhds\.v2\.MaskRequest"):
        TASKS["secure-train"].run(context(tmp_path, task, SECURE))


def test_the_update_is_trained_once_and_leaves_under_masks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = SecureRun(tmp_path / "run", tuple("abc"))
    folder, calls = tmp_path / "state", []
    kept = folder / file_key("run")
    kept.mkdir(parents=True)

    def trained(self: TrainTask, inner: TaskContext) -> tasks.TaskResult:
        # The same task as in the clear, on which data order and dropout depend.
        assert inner.task.id == "train/1/a"
        assert inner.task.request.Is(pb.TrainRequest.DESCRIPTOR)
        calls.append(inner.task.id)
        path = kept / "update-x.safetensors"
        path.write_bytes(run.update("a").read_bytes())
        artifact = Artifact.of_file(path)
        metadata = UpdateMetadata(artifact.digest, artifact.size, 5, LOSS, 1.0, 0, 1)
        path.with_suffix(".json").write_text(json.dumps({}))
        return tasks.TaskResult(pb.TrainResult(), FinishedUpdate(path, metadata))

    monkeypatch.setattr(TrainTask, "trained", trained)
    answers = []
    for step in range(5):
        for site in "bc":
            run.respond(site)
        assert run.state.stage is not None
        task = pb.Task(id=run.state.stage.task_id("a"), kind="secure-train", round_number=1)
        for _ in range(2):
            task.request.CopyFrom(run.asked("a"))
            result = TASKS["secure-train"].run(context(folder, task, run.spec, run))
            answers.append(result.message)
        assert answers[-1] == answers[-2]
        content = result.update.path.read_bytes() if result.update else b""
        assert bool(content) == (step == 2)
        if step == 2:
            # What was masked is no longer there without masks.
            assert [path.name for path in kept.glob("*.safetensors")] == []
        assert run.take("a", result.message, content) is None
        run.close()
    assert calls == ["train/1/a"]
    assert run.state.closed_rounds[0].contributions == dict.fromkeys("abc", 5)
