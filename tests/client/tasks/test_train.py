"""The task "train": rows that the run's strategy does not name are not trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import TaskError
from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.policy import SitePolicy
from fedhds_client.tasks import TASKS, TaskContext

CORESETS = {
    "all": selection_pb2.Coreset(all=selection_pb2.AllRows()),
    "random": selection_pb2.Coreset(random=selection_pb2.RandomRows(count=1)),
    "picks": selection_pb2.Coreset(picks=selection_pb2.ClusterPicks(select_task_id="select/0/ward")),
    "none": selection_pb2.Coreset(),
}
EXPECTED = {
    "full": "all",
    "random": "random",
    "fedhds": "picks",
    "fedhds-aligned": "picks",
    "federated-kmeans": "picks",
}


@pytest.mark.parametrize("strategy", EXPECTED)
@pytest.mark.parametrize("kind", CORESETS)
def test_a_coreset_of_another_strategy_is_refused_before_anything_is_trained(
    tmp_path: Path, strategy: str, kind: str
) -> None:
    account = Ledger(tmp_path / "ledger.db").account("rows", lambda: [b"row"])
    site = SimpleNamespace(name="ward", folder=tmp_path, shard=range(5), rows=5, account=account)
    spec = RunSpec.of(model="m", rounds=1, selection_strategy=strategy)
    models = SimpleNamespace(spec=spec, features=SimpleNamespace(release=lambda name: None))
    task = pb.Task(id="train/1/ward", kind="train", round_number=1)
    task.request.Pack(pb.TrainRequest(coreset=CORESETS[kind]))
    parts: Any = (
        site,
        0,
        SimpleNamespace(rules=SitePolicy(min_cluster_rows=5)),
        models,
        tmp_path / "adapter",
        SimpleNamespace(),
    )
    if kind != EXPECTED[strategy]:
        with pytest.raises(TaskError, match="the coordinator breaks its own specification"):
            TASKS["train"].run(TaskContext(task, "run", *parts))
    elif kind == "picks":
        # It is looked up, and was never reported.
        with pytest.raises(TaskError, match="reported no clusters"):
            TASKS["train"].run(TaskContext(task, "run", *parts))
    else:
        # It comes as far as the model, which is not here.
        with pytest.raises(AttributeError, match="model"):
            TASKS["train"].run(TaskContext(task, "run", *parts))
