"""Registering: the first values that the coordinator may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import FedhdsError, TaskError
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.registration import register


class Coordinator:
    """Asks for first values so many times."""

    federation: Any = type("Stub", (), {"Register": None})

    def __init__(self, asks: int, *, takes: bool = True) -> None:
        self.asks, self.takes = asks, takes
        self.requests: list[pb.RegisterRequest] = []
        self.uploads: list[bytes] = []

    async def call(self, method: object, request: pb.RegisterRequest) -> pb.RegisterResponse:
        self.requests.append(pb.RegisterRequest.FromString(request.SerializeToString()))
        return pb.RegisterResponse(first_values_needed=len(self.requests) <= self.asks)

    async def upload(self, session: str, path: Path, artifact: Artifact) -> None:
        if not self.takes:
            raise TaskError("another site was faster")
        self.uploads.append(path.read_bytes())


class Executor:
    """Has first values to send."""

    def write_first_values(self, path: Path) -> Artifact:
        path.write_bytes(b"values")
        return Artifact.of_file(path)


class Site:
    """Trains, and validates on three rows."""

    evaluates, held_out, validation = False, None, (1, 2, 3)


async def registered(coordinator: Coordinator, folder: Path) -> None:
    client: Any = coordinator
    executor: Any = Executor()
    site: Any = Site()
    await register(client, executor, site, pb.RegisterRequest(session="s", rows=7), folder)


async def test_who_is_not_asked_sends_nothing(tmp_path: Path) -> None:
    coordinator = Coordinator(asks=0)
    await registered(coordinator, tmp_path / "run")
    [request] = coordinator.requests
    assert (request.rows, request.evaluates, request.evaluation_rows, request.validation_rows) == (7, False, 0, 3)
    assert not request.HasField("first_values")
    assert coordinator.uploads == []


@pytest.mark.parametrize("takes", [True, False])
async def test_who_is_asked_sends_them_and_registers_again(tmp_path: Path, takes: bool) -> None:
    coordinator = Coordinator(asks=1, takes=takes)
    await registered(coordinator, tmp_path / "run")
    assert coordinator.uploads == [b"values"] * takes
    assert [request.HasField("first_values") for request in coordinator.requests] == [False, True]
    # Nothing of it stays.
    assert [*(tmp_path / "run").iterdir()] == []


async def test_a_coordinator_that_asks_for_ever_is_left(tmp_path: Path) -> None:
    coordinator = Coordinator(asks=100)
    with pytest.raises(FedhdsError, match="again and again"):
        await registered(coordinator, tmp_path / "run")
    assert len(coordinator.uploads) == 3
