"""Fixtures of the coordinator's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.postgres import PostgresServer
from tests.support.stores import Place, postgres_place, sqlite_place


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty database of each kind."""
    sqlite = request.param == "sqlite"
    made = sqlite_place(tmp_path) if sqlite else postgres_place(request.getfixturevalue("postgres"))
    yield made
    made.close()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Place]:
    made = sqlite_place(tmp_path)
    yield made
    made.close()


@pytest.fixture
def shared(postgres: PostgresServer) -> Iterator[Place]:
    """A database that several coordinators may open."""
    made = postgres_place(postgres)
    yield made
    made.close()
