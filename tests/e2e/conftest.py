"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.federation import Federation
from tests.support.tiny import make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def federation(tmp_path: Path, model: Path) -> Iterator[Federation]:
    """A folder for the processes of one test, which are ended with it."""
    made = Federation(tmp_path, model)
    yield made
    made.stop()
