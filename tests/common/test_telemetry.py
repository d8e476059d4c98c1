"""What the programs' log shows."""

from __future__ import annotations

import logging
from asyncio import CancelledError
from collections.abc import Iterator

import pytest

from fedhds.telemetry import configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level


@pytest.mark.parametrize(
    ("name", "error", "shown"),
    [
        ("grpc._cython.cygrpc", CancelledError(), False),
        ("grpc._cython.cygrpc", ValueError("no such thing"), True),
        ("fedhds_server.coordinator", CancelledError(), True),
    ],
)
def test_a_call_that_its_caller_gave_up_is_no_news(
    name: str, error: BaseException, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("INFO")
    logging.getLogger(name).error("ended", exc_info=error)
    assert ("ended" in capsys.readouterr().err) is shown
