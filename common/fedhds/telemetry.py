"""Logging set-up, the same for all programs: lines for people on standard error."""

from __future__ import annotations

import logging
import sys


def configure_logging(level: str) -> None:
    """Installs the one handler; called by main functions only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("fedhds").setLevel(level)
    for package in ("fedhds_server", "fedhds_client"):
        logging.getLogger(package).setLevel(level)
