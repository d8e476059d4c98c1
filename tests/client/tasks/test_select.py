"""The select task: what it refuses before any row is looked at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import PrivacyError, TaskError
from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.tasks import TASKS, TaskContext


def context(folder: Path, strategy: str, *, shard: Any = "rows", **settings: Any) -> TaskContext:
    site = SimpleNamespace(name="ward", folder=folder, shard=shard, ledger=Ledger(folder / "ledger.jsonl"))
    spec = RunSpec.of(model="m", rounds=1, selection_strategy=strategy, **settings)
    features = SimpleNamespace(of=lambda *_: pytest.fail("features were taken"))
    policy = SimpleNamespace(selection_max_epsilon=None, allow_exact_kmeans_sums=False)
    models = SimpleNamespace(spec=spec, features=features)
    task = pb.Task(id="select/0/ward", kind="select")
    parts: Any = (site, 0, policy, models, folder / "adapter", SimpleNamespace())
    return TaskContext(task, "run", *parts)


@pytest.mark.parametrize("strategy", ["full", "random"])
def test_strategies_without_reports_let_nothing_out(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(TaskError, match=f"the selection strategy {strategy} asks sites for no report"):
        TASKS["select"].run(context(tmp_path, strategy))
    assert not list(tmp_path.iterdir())


def test_a_site_without_training_rows_has_nothing_to_select_from(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no training rows to select from"):
        TASKS["select"].run(context(tmp_path, "fedhds", shard=None))


def test_exact_sums_need_the_sites_consent(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="--allow-exact-kmeans-sums"):
        TASKS["select"].run(context(tmp_path, "federated-kmeans"))
    assert not list(tmp_path.iterdir())


def test_a_request_of_another_strategy_is_refused(tmp_path: Path) -> None:
    at = context(tmp_path, "federated-kmeans")
    at.task.request.Pack(selection_pb2.Coreset())
    with pytest.raises(TaskError, match=r"v2\.Coreset, but fedhds .* expects fedhds\.v2\.KMeansCenters"):
        TASKS["select"].run(at)
