"""The select task: what it refuses before any row is looked at."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedhds.errors import PrivacyError, TaskError
from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.features.extraction import Features
from fedhds_client.policy import SitePolicy
from fedhds_client.state_files import MAX_REPORTS, MAX_RUNS, report_folder
from fedhds_client.tasks import TASKS, TaskContext
from fedhds_client.tasks.select import _draw_map


def context(folder: Path, strategy: str, *, shard: Any = "rows", **settings: Any) -> TaskContext:
    account = Ledger(folder / "ledger.db").account("rows", lambda: [b"row"])
    site = SimpleNamespace(name="ward", folder=folder, shard=shard, account=account, target=None)
    spec = RunSpec.of(model="m", rounds=1, selection_strategy=strategy, **settings)
    features = SimpleNamespace(of=lambda *_: pytest.fail("features were taken"))
    policy = SimpleNamespace(rules=SitePolicy())
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


def test_noise_that_hides_no_row_needs_the_same_consent(tmp_path: Path) -> None:
    noise = {"selection_clip_norm": 1.0, "selection_noise_multiplier": 1e-9}
    with pytest.raises(PrivacyError, match=r"or the run with a noise multiplier of 0\.1 at least"):
        TASKS["select"].run(context(tmp_path, "federated-kmeans", **noise))


def test_a_request_of_another_strategy_is_refused(tmp_path: Path) -> None:
    at = context(tmp_path, "federated-kmeans")
    at.task.request.Pack(selection_pb2.Coreset())
    with pytest.raises(TaskError, match=r"v2\.Coreset, but fedhds .* expects fedhds\.v2\.KMeansCenters"):
        TASKS["select"].run(at)


def test_reports_for_people_are_kept_of_the_newest_selections_and_runs(tmp_path: Path) -> None:
    features = Features(np.arange(6), np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32))
    labels = np.array([0, 0, 0, 1, 1, 1])
    for run in range(MAX_RUNS + 2):
        for number in range(MAX_REPORTS + 3 if run > MAX_RUNS else 1):
            folder = report_folder(tmp_path, f"run {run}", f"select/{number}/ward")
            _draw_map(folder, features, features.values, labels, seed=1)
            # The clocks of file systems are coarse.
            os.utime(folder, (1000 + number, 1000 + number))
        os.utime(folder.parent, (1000 + run, 1000 + run))
    assert len(list((tmp_path / "reports").iterdir())) == MAX_RUNS
    kept = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(kept) == MAX_REPORTS
    assert kept[-1] == folder
    assert (folder / "map.npz").exists()
