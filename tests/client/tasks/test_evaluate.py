"""The task "evaluate": metrics of a few rows are not measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import PrivacyError, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.tasks import TASKS, TaskContext


def context(folder: Path, *, rows: int | None, floor: int) -> TaskContext:
    site = SimpleNamespace(name="ward", held_out=None if rows is None else range(rows))
    parts: Any = (site, 0, SimpleNamespace(min_cluster_rows=floor), SimpleNamespace(), folder, SimpleNamespace())
    return TaskContext(pb.Task(id="evaluate/0/ward", kind="evaluate"), "run", *parts)


def test_fewer_rows_than_the_floor_are_not_measured(tmp_path: Path) -> None:
    """Rows that the run's template refuses are left out after the site has opened its files."""
    with pytest.raises(PrivacyError, match="4 rows to evaluate on, and measures none below 5"):
        TASKS["evaluate"].run(context(tmp_path, rows=4, floor=5))
    with pytest.raises(TaskError, match="no rows to evaluate on"):
        TASKS["evaluate"].run(context(tmp_path, rows=None, floor=5))
    for rows, floor in ((5, 5), (4, 4)):
        # They come as far as the model, which is not here.
        with pytest.raises(AttributeError, match="model"):
            TASKS["evaluate"].run(context(tmp_path, rows=rows, floor=floor))
