"""What a person sees while a sweep runs: one display for all processes on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedhds.v2 import status_pb2


class SweepDisplay:
    """A bar for the sweep and one for the rounds of the run that is under way."""

    def __init__(self, console: Console, runs: int, done: int) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        self._sweep = self._progress.add_task("runs", total=runs, completed=done, visible=runs > 1)
        self._rounds = self._progress.add_task("", total=None)
        self._label = ""
        self._last = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begins(self, label: str, rounds: int) -> None:
        """The next run begins."""
        self._label, self._last = label, ""
        self._progress.reset(self._rounds, description=f"{label}: starting", total=rounds)
        self.say(f"{label}: starts")

    def watch(self, status: status_pb2.GetStatusResponse) -> None:
        """Shows how far the run is."""
        doing = status.phase
        if status.HasField("cohort"):
            cohort = status.cohort
            doing += f", {cohort.answered} of {cohort.answered + cohort.working} sites answered"
        elif status.message:
            doing += f", {status.message}"
        closed = len(status.closed_rounds)
        self._progress.update(self._rounds, description=f"{self._label}: {doing}", completed=closed)
        line = f"{status.phase}, {closed} rounds closed"
        if not self._console.is_terminal and line != self._last:
            self.say(f"{self._label}: {line}")
        self._last = line

    def ended(self) -> None:
        """The run is over."""
        self._progress.advance(self._sweep)
