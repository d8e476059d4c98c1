"""The steps of a transfer on the disk's side, which run in threads beside the event loop that serves the link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Its own, as transfers are not to wait for what lasts: a fold, a checkpoint, an object store.
_THREADS = ThreadPoolExecutor(thread_name_prefix="transfer")


class BackgroundStep:
    """One transfer's steps: one after the other, at most one of them ahead of the event loop.

    A step that has ended when it is asked for costs the loop no turn, and no task; with a chunk per step that is most
    of what the hop would cost.
    """

    def __init__(self) -> None:
        self._step: Future[Any] | None = None

    async def start(self, step: Callable[..., Any], *arguments: Any) -> None:
        """Starts a step when the one before has ended; raises what that raised."""
        await self.ended()
        self._step = _THREADS.submit(step, *arguments)

    async def ended(self) -> Any:
        """What the last step gave or raised, None before the first; a step goes on when its caller is cancelled."""
        if self._step is None:
            return None
        if not self._step.done():
            waiting = asyncio.wrap_future(self._step)
            # What it raises is read off the step, or nobody's to hear when the caller is cancelled.
            waiting.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            await asyncio.wait([waiting])
        return self._step.result()
