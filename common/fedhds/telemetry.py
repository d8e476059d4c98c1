"""Logging set-up, the same for all programs: lines for people on standard error."""

from __future__ import annotations

import logging
import sys
from asyncio import CancelledError


def configure_logging(level: str) -> None:
    """Installs the one handler; called by main functions only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_is_news)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedhds").setLevel(level)
    for package in ("fedhds_server", "fedhds_client"):
        logging.getLogger(package).setLevel(level)


def _is_news(record: logging.LogRecord) -> bool:
    """Everything but that a caller gave a call up, which grpcio now and then logs as an error with a traceback."""
    given_up = record.exc_info is not None and isinstance(record.exc_info[1], CancelledError)
    return not (given_up and record.name.startswith("grpc"))
