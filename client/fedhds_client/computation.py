"""How a computation in the worker thread takes its turn, reports its progress and learns that it is to stop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from fedhds.errors import FedhdsError

Result = TypeVar("Result")


class Cancelled(FedhdsError):
    """The computation was stopped on request."""


@dataclass(eq=False)
class Control:
    """What the event loop and one computation share."""

    progress: float = 0.0
    """The share that is done, 0 to 1."""
    show: Callable[[float], None] = lambda share: None
    """Called with every new progress, in the worker thread."""
    ahead: tuple[Control, ...] = ()
    """The computations of other sites that come first."""
    ended: bool = False
    _cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def advance(self) -> float:
        """The share that is done of the wait for a turn and of the computation together, 0 to 1."""
        if not self.ahead:
            return self.progress
        waited = sum(1.0 if other.ended else other.progress for other in self.ahead) / len(self.ahead)
        return (waited + self.progress) / 2

    def report(self, share: float) -> None:
        """Sets the share that is done, 0 to 1."""
        self.progress = share
        self.show(share)

    def first(self, length: float) -> Control:
        """The control of the first `length` of this computation, a share."""
        return Control(show=lambda share: self.report(length * share), _cancelled=self._cancelled)

    def cancel(self) -> None:
        """Asks the computation to stop at its next step."""
        self._cancelled.set()

    def cancelled(self) -> bool:
        """Whether the computation is to stop."""
        return self._cancelled.is_set()


class ComputeThread(ThreadPoolExecutor):
    """The process's one thread for computations: all sites share one model, and take turns."""

    def __init__(self) -> None:
        super().__init__(max_workers=1, thread_name_prefix="compute")
        self._queue: tuple[Control, ...] = ()

    def start(self, compute: Callable[[Control], Result], control: Control) -> asyncio.Future[Result]:
        """Computes once those before it have ended, in the caller's context; call it on the event loop."""
        control.ahead = tuple(other for other in self._queue if not other.ended)
        self._queue = (*control.ahead, control)
        future = asyncio.get_running_loop().run_in_executor(self, contextvars.copy_context().run, compute, control)
        future.add_done_callback(lambda _: setattr(control, "ended", True))
        return future
