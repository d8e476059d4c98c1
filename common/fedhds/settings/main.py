"""The main function of a daemon: errors become one line and an exit status."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from fedhds.errors import FedhdsError, UsageError


def run_main(program: str, body: Callable[[], int]) -> NoReturn:
    """Runs a daemon's main function: domain errors become one line and an exit status, never a traceback.

    2: a mistake in what was asked for; 1: any other domain error; 130, 143: ended by
    Ctrl-C or SIGTERM before the daemon ran.
    """
    from fedhds.runtime.logging import last_words

    # Until the daemon installs its own handler: the first process of a container ignores SIGTERM by default.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        status = body()
    except FedhdsError as error:
        last_words(program, error)
        status = 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        last_words(program, "interrupted")
        status = 130
    sys.exit(status)
