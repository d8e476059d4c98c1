"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second kills."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable

logger = logging.getLogger(__name__)


def on_signal(stop: Callable[[], object]) -> Callable[[], int]:
    """Calls `stop` at the first SIGINT or SIGTERM and kills the process at the second.

    Must run within the event loop. Returns a function that gives the exit status: 128 + the signal, 0 without one.
    """
    loop = asyncio.get_running_loop()
    received: list[int] = []

    def handle(number: int) -> None:
        if received:
            # The default action, so that the exit status tells the truth; nothing durable is in memory only.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            # The first process of a container is spared by signals that it does not handle.
            os._exit(128 + number)
        received.append(number)
        logger.info("stopping; the same signal again ends at once")
        stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    return lambda: 128 + received[0] if received else 0
