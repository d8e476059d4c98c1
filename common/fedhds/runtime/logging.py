"""Logging set-up, the same for all programs: lines for people on standard error, or JSON objects for machines.

Every line about an error ends with the error's code. On a terminal, lines go through the console that progress bars
are drawn on, so that each leaves the other whole.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from textwrap import indent
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from fedhds.encoding import escaped, shown
from fedhds.errors import FedhdsError, code_of, coded

if TYPE_CHECKING:
    from rich.console import Console

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["plain", "json"]

_FACTS: ContextVar[Callable[[], Mapping[str, object]]] = ContextVar("facts", default=dict)
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


def configure_logging(level: LogLevel, form: LogFormat = "plain") -> None:
    """Installs the one handler; called by main functions only."""
    if form == "json":
        handler: logging.Handler = _JsonHandler(sys.stderr)
        # What would else write text of its own between the objects.
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
    else:
        console = _terminal()
        handler = _TerminalHandler(console) if console else logging.StreamHandler(sys.stderr)
        handler.setFormatter(_PlainFormatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_is_news)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedhds").setLevel(level)
    for package in ("fedhds_server", "fedhds_client"):
        logging.getLogger(package).setLevel(level)


def terminal() -> Console | None:
    """The console for progress bars; None where there is no terminal, or JSON is logged."""
    handlers = logging.getLogger().handlers
    return next((handler.console for handler in handlers if isinstance(handler, _TerminalHandler)), None)


def about(facts: Callable[[], Mapping[str, object]]) -> None:
    """Has the JSON that this task, and whatever it starts, logs carry `facts`: run, site, round; empty ones do not."""
    _FACTS.set(facts)


def last_words(program: str, error: FedhdsError | str) -> None:
    """Says why a program ends, in the form of its log."""
    if any(isinstance(handler, _JsonHandler) for handler in logging.getLogger().handlers):
        logging.getLogger("fedhds").error("%s: %s", program, error)
    else:
        sys.stderr.write(f"{program}: {coded(error) if isinstance(error, FedhdsError) else error}\n")


class _PlainFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, with the code of the error that it is about behind it.

        One line, whatever it quotes: coordinators and sites must not write lines of each other's logs.
        """
        code = _code(record)
        return shown(super().formatMessage(record)) + (f" [{code}]" if code else "")

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback, indented, so that nothing that it quotes looks like a line of the log."""
        return indent(shown(super().formatException(ei), keep="\n"), "  ")


class _TerminalHandler(logging.Handler):
    """Prints above whatever bars the console shows."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record; `logging.raiseExceptions` decides about a terminal that is gone."""
        from rich.text import Text

        try:
            # As text, or what looks like markup or an emoji's name would be made one.
            self.console.print(Text(self.format(record), _STYLES.get(record.levelno, "")), soft_wrap=True)
        except (OSError, LookupError, TypeError, ValueError):
            # As logging's own handlers do: a record that cannot be written is not its caller's end.
            self.handleError(record)


class _JsonHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """One JSON object per line: time (RFC 3339, UTC), level, logger, message, and what else is known."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, ASCII only: no character of a message can end the line or steer a terminal.

        Bytes of file names that are not UTF-8 are escaped as in plain lines; JSON has no way to write them.
        """
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        known: dict[str, object] = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "code": _code(record),
            **_FACTS.get()(),
        }
        if record.exc_info:
            known["exception"] = logging.Formatter().formatException(record.exc_info)
        return json.dumps({name: _writable(value) for name, value in known.items() if value}, default=str)


def _writable(value: object) -> object:
    return escaped(value) if isinstance(value, str) else value


def _terminal() -> Console | None:
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        return None
    from rich.console import Console

    return Console(stderr=True, emoji=False)


def _code(record: logging.LogRecord) -> str:
    """The code of the error that a record is about, empty if it is about none."""
    if record.exc_info and record.exc_info[1]:
        return code_of(record.exc_info[1])
    arguments = record.args if isinstance(record.args, tuple) else ()
    explicit: str = getattr(record, "code", "")
    return next((argument.code for argument in arguments if isinstance(argument, FedhdsError)), explicit)


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("fedhds").critical("ended by an error", exc_info=(kind, error, traceback))


def _is_news(record: logging.LogRecord) -> bool:
    """Everything but that a caller gave a call up, which grpcio and uvicorn log as an error with a traceback."""
    given_up = record.exc_info is not None and isinstance(record.exc_info[1], CancelledError)
    return not (given_up and record.name.startswith(("grpc", "uvicorn")))
