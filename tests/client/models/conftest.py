"""Tiny models of several architectures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.model_folders import make_other_model
from tests.support.tiny import make_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """One tiny model of each of three architectures."""
    if request.param == "llama":
        return llama
    return make_other_model(tmp_path_factory.mktemp("other"), llama, request.param)
