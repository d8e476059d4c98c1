"""MLflow: at $MLFLOW_TRACKING_URI, by default the folder `mlruns` of the run folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from fedhds_server.observers.tracker import Tracker
from fedhds_server.run.state import Phase

_TAG = "fedhds.run_id"


class MLflow(Tracker):
    """One run of MLflow for each run, found again by its tag; a metric's history says which rounds it has."""

    package = "mlflow"
    _client: Any = None

    def open(self, parameters: Mapping[str, str]) -> None:
        """Finds the run or makes it; parameters that it has stay."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # Files need no database; MLflow wants to be told that they are meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI") or (self.context.folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "fedhds"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        runs = self._client.search_runs([number], filter_string=f"tags.`{_TAG}` = '{self.run_id}'", max_results=1)
        run = runs[0] if runs else self._client.create_run(number, tags={_TAG: self.run_id}, run_name=self.run_id)
        self._id = run.info.run_id
        self._client.update_run(self._id, status="RUNNING")
        missing = [Param(key, value[:6000]) for key, value in parameters.items() if key not in run.data.params]
        # As many as one call takes.
        for start in range(0, len(missing), 100):
            self._client.log_batch(self._id, params=missing[start : start + 100])
        self._known: dict[str, set[int]] = {}

    def write(self, round_number: int, scalars: Mapping[str, float]) -> None:
        """In one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [
            Metric(name, value, now, round_number)
            for name, value in scalars.items()
            if round_number not in self._steps(name)
        ]
        if new:
            self._client.log_batch(self._id, metrics=new)
        for metric in new:
            self._steps(metric.key).add(round_number)

    def finish(self, phase: Phase) -> None:
        """Finished, failed, or killed where an operator stopped the run."""
        status = {Phase.COMPLETED: "FINISHED", Phase.STOPPED: "KILLED"}.get(phase, "FAILED")
        self._client.set_terminated(self._id, status=status)

    def _steps(self, name: str) -> set[int]:
        if name not in self._known:
            self._known[name] = {metric.step for metric in self._client.get_metric_history(self._id, name)}
        return self._known[name]
