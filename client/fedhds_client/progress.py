"""How long work is shown to the people at a site: a bar on a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

# Often enough to see that it goes on, seldom enough for a log that is kept.
_LINE_EVERY_S = 30.0


@contextmanager
def shown(description: str) -> Iterator[Callable[[float], None]]:
    """Gives a function that takes the share done, 0 to 1."""
    if not sys.stderr.isatty():
        yield _lines(description)
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _lines(description: str) -> Callable[[float], None]:
    said = time.monotonic()

    def say(share: float) -> None:
        nonlocal said
        if time.monotonic() - said >= _LINE_EVERY_S:
            said = time.monotonic()
            logger.info("%s: %.0f %%", description, 100 * share)

    return say
