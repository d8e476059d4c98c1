"""Whether the event loop goes on: measured, and with a look at what holds it up when it does not."""

from __future__ import annotations

import asyncio
import faulthandler
import sys
import time

from fedhds.runtime.metrics import LOOP_LAG

_TICK_S = 1.0
# Longer than any pause that a busy machine makes, shorter than what orchestrators wait before they kill (30 s).
STALLED_S = 10.0


async def watch_loop() -> None:
    """Runs until cancelled; when the loop stands still, every thread's stack is written to standard error, once.

    By a thread of the interpreter that needs neither the loop nor its lock: a loop that stands still cannot say so.
    """
    try:
        while True:
            faulthandler.dump_traceback_later(STALLED_S, file=sys.__stderr__ or sys.stderr)
            started = time.monotonic()
            await asyncio.sleep(_TICK_S)
            LOOP_LAG.observe(max(0.0, time.monotonic() - started - _TICK_S))
    finally:
        faulthandler.cancel_dump_traceback_later()
