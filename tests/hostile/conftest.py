"""Fixtures of the attacks: a federation to attack, and the adapter that its honest sites give when nobody does.

A module's own fixture shares one federation among its attacks, and checks at its end that the honest run was not hurt:

    @pytest.fixture(scope="module")
    def federation(secured: Secured, undisturbed: Undisturbed) -> Iterator[SecureFederation]:
        federation = secured(*FLAGS)
        yield federation
        federation.finish()
        assert federation.adapter == undisturbed(*FLAGS)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.attackers import SecureFederation
from tests.support.tiny import make_model

Secured = Callable[..., SecureFederation]
Undisturbed = Callable[..., bytes]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model."""
    return make_model(tmp_path_factory.mktemp("model"))


def started(folder: Path, model: Path, *flags: str, names: str = "ab") -> SecureFederation:
    federation = SecureFederation(folder, model)
    try:
        federation.begin("--selection-strategy=full", "--evaluate-every=0", *flags)
        for name in names:
            federation.honest(name)
    except BaseException:
        federation.stop()
        raise
    return federation


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Secured]:
    """Starts a coordinator with `flags` and the honest sites `names`; everything ends with the module."""
    made: list[SecureFederation] = []

    def start(*flags: str, names: str = "ab") -> SecureFederation:
        made.append(started(tmp_path_factory.mktemp("federation"), model, *flags, names=names))
        return made[-1]

    yield start
    for federation in made:
        federation.stop()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Undisturbed:
    """The final adapter of the honest sites `names` alone, in a run with `flags`."""
    known: dict[tuple[str, ...], bytes] = {}

    def give(*flags: str, names: str = "ab") -> bytes:
        key = (names, *flags)
        if key not in known:
            federation = started(tmp_path_factory.mktemp("undisturbed"), model, *flags, names=names)
            try:
                federation.finish()
            finally:
                federation.stop()
            known[key] = federation.adapter
        return known[key]

    return give
