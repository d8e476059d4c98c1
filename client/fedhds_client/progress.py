"""How long work is shown to the people at a site: bars on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from fedhds.runtime.logging import terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

logger = logging.getLogger(__name__)

# Often enough to see that it goes on, seldom enough for a log that is kept.
_LINE_EVERY_S = 30.0


class ProgressDisplay:
    """Work in progress of all sites of a process; used on one thread, what it gives out is for any."""

    def __init__(self) -> None:
        self._bars: Progress | None = None

    @contextmanager
    def work(self, description: str) -> Iterator[Callable[[float], None]]:
        """Gives a function that takes the share done, 0 to 1."""
        console = terminal()
        if not console:
            yield _lines(description)
            return
        # One display for all: two that move the cursor would write over each other.
        bars = self._bars = self._bars or _started(console)
        bar = bars.add_task(description, total=1.0)
        try:
            yield functools.partial(_moved, bars, bar)
        finally:
            bars.remove_task(bar)
            if not bars.task_ids:
                bars.stop()
                self._bars = None


def _started(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # A site's name is no markup.
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console, transient=True)
    bars.start()
    return bars


def _moved(bars: Progress, bar: TaskID, share: float) -> None:
    # A computation that nobody waits for any more goes on until its next step.
    with suppress(KeyError):
        bars.update(bar, completed=share)


def _lines(description: str) -> Callable[[float], None]:
    last_s = time.monotonic()

    def show(share: float) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= _LINE_EVERY_S:
            last_s = time.monotonic()
            logger.info("%s: %.0f %%", description, 100 * share)

    return show
