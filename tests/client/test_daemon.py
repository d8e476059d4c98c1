"""The task loop of a site."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.errors import ArtifactError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.daemon import SiteLoop
from fedhds_client.progress import ProgressDisplay
from fedhds_client.updates.update import Facts, Trained


class Link:
    """A coordinator that has lost the first `losses` uploads when it is told that they are complete."""

    def __init__(self, losses: int) -> None:
        self.federation = SimpleNamespace(CompleteTask="CompleteTask")
        self.losses = losses
        self.uploads = 0

    async def upload(self, *_: object) -> None:
        self.uploads += 1

    async def call(self, method: str, request: pb.CompleteTaskRequest) -> pb.CompleteTaskResponse:
        if self.uploads <= self.losses:
            raise ArtifactError("the update was damaged where it was kept; upload it again")
        return pb.CompleteTaskResponse(accepted=True)


@pytest.mark.parametrize(("losses", "taken"), [(0, True), (1, True), (2, False)])
async def test_an_update_that_the_coordinator_lost_is_uploaded_once_more(
    tmp_path: Path, losses: int, taken: bool
) -> None:
    path = tmp_path / "update"
    path.touch()
    trained = Trained(path, Facts("0" * 64, 1, samples=1, loss=1.0, seconds=1.0, truncated=0, round=1))

    async def fetch(*_: object) -> Path:
        return tmp_path / "adapter"

    link, worker = Link(losses), ThreadPoolExecutor(1)
    parts: Any = (
        SimpleNamespace(name="a"),
        link,
        SimpleNamespace(fetch=fetch, train=lambda *_: trained),
        worker,
        SimpleNamespace(),
        ProgressDisplay(),
    )
    loop = SiteLoop(*parts)
    task = pb.NextTaskResponse(task_id="train/1/a", round=1, train=pb.TrainRequest())
    if taken:
        assert (await loop._result(task, "train")).accepted
    else:
        with pytest.raises(ArtifactError, match="upload it again"):
            await loop._result(task, "train")
    assert link.uploads == min(losses + 1, 2)
    # Until it is taken, a restarted site finds it.
    assert path.exists() != taken
    worker.shutdown()
