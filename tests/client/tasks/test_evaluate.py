"""The tasks "evaluate" and "validate": metrics of a few rows are not measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import PrivacyError, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.policy import SitePolicy
from fedhds_client.tasks import TASKS, TaskContext


def context(folder: Path, kind: str, *, rows: int | None, floor: int) -> TaskContext:
    own = None if rows is None else range(rows)
    site = SimpleNamespace(name="ward", held_out=own, validation=own)
    parts: Any = (
        site,
        0,
        SimpleNamespace(rules=SitePolicy(min_cluster_rows=floor)),
        SimpleNamespace(),
        folder,
        SimpleNamespace(),
    )
    return TaskContext(pb.Task(id=f"{kind}/0/ward", kind=kind), "run", *parts)


@pytest.mark.parametrize("kind", ["evaluate", "validate"])
def test_fewer_rows_than_the_floor_are_not_measured(tmp_path: Path, kind: str) -> None:
    """Rows that the run's template refuses are left out after the site has opened its files."""
    with pytest.raises(PrivacyError, match=f"4 rows to {kind} on, and measures none below 5"):
        TASKS[kind].run(context(tmp_path, kind, rows=4, floor=5))
    with pytest.raises(TaskError, match=f"no rows to {kind} on"):
        TASKS[kind].run(context(tmp_path, kind, rows=None, floor=5))
    for rows, floor in ((5, 5), (4, 4)):
        # They come as far as the model, which is not here.
        with pytest.raises(AttributeError, match="model"):
            TASKS[kind].run(context(tmp_path, kind, rows=rows, floor=floor))
