"""The interface of observers, and their queue: they hear of what is durable, and can never hold the run up."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from abc import ABC
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedhds.spec import RunSpec
from fedhds_server.run.state import ClosedRound, Evaluation, Phase, RunState
from fedhds_server.storage.base import JournalEntry

logger = logging.getLogger(__name__)

# What an observer that stands still at the end of a run is waited for.
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class ObserverContext:
    """What an observer is made with."""

    folder: Path
    """The run folder."""
    spec: RunSpec
    """The run's specification, for those who keep it beside what they measure."""


class RunObserver(ABC):
    """Hears of a run after each save, in order, in a thread of its own: no observer waits for another.

    After a restart `started` comes first, with everything that happened before; what an observer heard in the seconds
    before a crash may not have reached its place, so it should compare. What it raises is logged and stops nothing.
    """

    def __init__(self, context: ObserverContext) -> None:
        self.context = context

    def started(self, run_id: str, rounds: Sequence[ClosedRound]) -> None:
        """This coordinator leads the run from now on; `rounds` are closed already."""

    def recorded(self, entry: JournalEntry) -> None:
        """A line of the journal."""

    def round_closed(self, closed: ClosedRound) -> None:
        """A round is over, and its adapter durable."""

    def evaluated(self, round_number: int, site: str, evaluation: Evaluation) -> None:
        """An evaluator measured the adapter of a round; 0 is the base model."""

    def validated(self, round_number: int, site: str, validation: Evaluation) -> None:
        """A site measured the adapter of a round on rows that steer the run; 0 is the base model."""

    def ended(self, phase: Phase, message: str) -> None:
        """The run is over."""

    def closed(self) -> None:
        """This coordinator stops, whether or not the run is over; nothing comes after it."""


class _Listener:
    """One observer with its queue and its thread, so that none waits for another."""

    def __init__(self, observer: RunObserver) -> None:
        self._observer = observer
        # None ends the thread. A daemon: an observer that stands still must not keep the process from ending either.
        self._calls: queue.SimpleQueue[Callable[[RunObserver], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=type(observer).__name__, daemon=True)
        self.dropped = False

    def tell(self, call: Callable[[RunObserver], None] | None) -> None:
        self._calls.put(call)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None and not self.dropped:
            self._call(call)
        if not self.dropped:
            self._call(lambda observer: observer.closed())

    def _call(self, call: Callable[[RunObserver], None]) -> None:
        try:
            call(self._observer)
        except Exception:
            # A run must not end because a tracking service does not answer.
            logger.exception("the observer %s failed", type(self._observer).__name__)


class Observers:
    """Tells the observers of a coordinator what each save changed."""

    def __init__(self, observers: Sequence[RunObserver]) -> None:
        self._listeners = [_Listener(observer) for observer in observers]
        self._rounds = 0
        self._measured: set[tuple[str, int, str]] = set()
        self._over = False

    def started(self, state: RunState) -> None:
        """Everything in `state` counts as told with this call, but evaluations and validations, which are told each."""
        for listener in self._listeners:
            listener.thread.start()
        self._rounds, self._over = len(state.closed_rounds), state.phase.over
        run_id, rounds = state.run_id, tuple(state.closed_rounds)
        self._tell(lambda observer: observer.started(run_id, rounds))
        self._tell_evaluations(state)

    def committed(self, state: RunState, entries: Sequence[JournalEntry]) -> None:
        """Compares the saved state with what was told before."""
        if not self._listeners:
            return
        for entry in entries:
            self._tell(lambda observer, entry=entry: observer.recorded(entry))
        for closed in state.closed_rounds[self._rounds :]:
            self._tell(lambda observer, closed=closed: observer.round_closed(closed))
        self._rounds = len(state.closed_rounds)
        self._tell_evaluations(state)
        if state.phase.over and not self._over:
            self._over = True
            phase, message = state.phase, state.message
            self._tell(lambda observer: observer.ended(phase, message))

    async def close(self) -> None:
        """Tells what is left; to be called once, after `started`."""
        for listener in self._listeners:
            listener.tell(None)
        ends = time.monotonic() + _CLOSE_S
        for listener in self._listeners:
            await asyncio.to_thread(listener.thread.join, max(ends - time.monotonic(), 0))
            if listener.thread.is_alive():
                listener.dropped = True
                logger.warning(
                    "the observer %s has not finished within %.0f s; what is left is dropped",
                    listener.thread.name,
                    _CLOSE_S,
                )

    def _tell_evaluations(self, state: RunState) -> None:
        kinds = {"evaluated": state.evaluations, "validated": state.validations}
        if sum(len(sites) for rounds in kinds.values() for sites in rounds.values()) == len(self._measured):
            return
        for kind, rounds in kinds.items():
            for number, sites in rounds.items():
                for site, sums in sites.items():
                    if (kind, number, site) not in self._measured:
                        self._measured.add((kind, number, site))
                        self._tell(lambda each, name=kind, of=(number, site, sums): getattr(each, name)(*of))

    def _tell(self, call: Callable[..., None]) -> None:
        for listener in self._listeners:
            listener.tell(call)
