"""What the programs' log shows."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from asyncio import CancelledError
from collections.abc import Iterator

import pytest
from rich.console import Console

from fedhds.errors import StorageError, TaskError
from fedhds.runtime.logging import _TerminalHandler, about, configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)
    sys.excepthook = sys.__excepthook__


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


def test_a_line_about_an_error_ends_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    logger = logging.getLogger("fedhds_client.daemon")
    logger.error("%s: %s", "a", TaskError("no rows"))
    logger.warning("%s is away", "a", extra={"code": "FH52"})
    logger.info("%s: all is well", "a")
    try:
        raise StorageError("the disk is full")
    except StorageError:
        logger.exception("%s: failed", "a")
    lines = capsys.readouterr().err.splitlines()
    ends = [
        "ERROR   a: no rows [FH31]",
        "WARNING a is away [FH52]",
        "INFO    a: all is well",
        "ERROR   a: failed [FH50]",
    ]
    assert [line[9:] for line in lines[:4]] == ends
    assert lines[-1] == "  fedhds.errors.StorageError: the disk is full"


def test_what_a_line_quotes_forges_no_other_and_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    logger, bad = logging.getLogger("fedhds"), "a\x1b[2Jb\n12:00:00 INFO forged\u202ec\x07"
    logger.info("they say %s", bad)
    try:
        raise ValueError(bad)
    except ValueError:
        logger.exception("failed")
    captured = capsys.readouterr().err
    assert not set("\x1b\x07\u202e") & set(captured)
    assert captured.splitlines()[0].endswith("they say a [2Jb 12:00:00 INFO forged c ")
    assert [line for line in captured.splitlines()[2:] if not line.startswith("  ")] == []


def test_a_terminal_shows_messages_as_they_are_and_no_record_ends_its_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=40, emoji=False)
    logger = logging.Logger("lib")
    logger.addHandler(_TerminalHandler(console))
    logger.error("bad %d %d", 1)
    logger.error("a:key:b [bold]at[/bold] %s", "/data:key:1")
    assert console.file.getvalue() == "a:key:b [bold]at[/bold] /data:key:1\n"  # type: ignore[attr-defined]
    assert capsys.readouterr() == ("", "")


def test_a_json_line_holds_whatever_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json")
    logger = logging.getLogger("fedhds_client.daemon")
    about(lambda: {"run": "r1", "site": "a", "round": 0})
    logger.error("%s: in two\nlines, with \x1b[31m and \u2028", "a")
    try:
        raise ValueError("a library's")
    except ValueError:
        logger.exception("failed")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # `catch_warnings` has removed what showed them.
        configure_logging("INFO", "json")
        warnings.warn("this goes", stacklevel=1)
    sys.excepthook(TypeError, TypeError("a defect"), None)
    about(dict)
    lines = capsys.readouterr().err.split("\n")
    assert lines.pop() == ""
    first, second, third, last = (json.loads(line) for line in lines)
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "ERROR",
        "logger": "fedhds_client.daemon",
        "message": "a: in two\nlines, with \x1b[31m and \u2028",
        "run": "r1",
        "site": "a",
    }
    assert second["code"] == "FH90"
    assert second["exception"].endswith("ValueError: a library's")
    assert (third["logger"], third["level"]) == ("py.warnings", "WARNING")
    assert (last["level"], last["code"], last["exception"]) == ("CRITICAL", "FH90", "TypeError: a defect")
