"""How a computation in the worker thread reports its progress and learns that it is to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from fedhds.errors import FedhdsError


class Cancelled(FedhdsError):
    """The computation was stopped on request."""


@dataclass
class Control:
    """What the event loop and one computation share."""

    progress: float = 0.0
    """The share that is done, 0 to 1."""
    show: Callable[[float], None] = lambda share: None
    """Called with every new progress, in the worker thread."""
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def report(self, share: float) -> None:
        """Sets the share that is done, 0 to 1."""
        self.progress = share
        self.show(share)

    def cancel(self) -> None:
        """Asks the computation to stop at its next step."""
        self._cancelled.set()

    def cancelled(self) -> bool:
        """Whether the computation is to stop."""
        return self._cancelled.is_set()
