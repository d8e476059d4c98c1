"""What tracking services have in common: scalars of rounds and evaluations, each once, whatever the service does."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fedhds.settings import flat
from fedhds_server.observers.base import ObserverContext, RunObserver
from fedhds_server.run.state import ClosedRound, Evaluation, Phase
from fedhds_server.status import means_of

logger = logging.getLogger(__name__)


class Tracker(RunObserver):
    """Turns what is durable into scalars by round, and hands them to a service that may be away.

    A failure is said once. What could not be written is kept and written with what comes next; after a restart
    everything is told again, and only what the service does not have is written.
    """

    package: ClassVar[str]
    """The module without which it cannot work."""

    def __init__(self, context: ObserverContext) -> None:
        super().__init__(context)
        self.run_id = ""
        self._waiting: deque[tuple[int, Mapping[str, float]]] = deque()
        self._evaluations: dict[int, dict[str, Evaluation]] = {}
        self._settled: set[int] = set()
        self._open = False
        self._failing = False

    @abstractmethod
    def open(self, parameters: Mapping[str, str]) -> None:
        """Finds the service's record of `self.run_id`, or makes it with these parameters; reads what it has."""

    @abstractmethod
    def write(self, round_number: int, scalars: Mapping[str, float]) -> None:
        """Writes those of the scalars that the record does not have yet, durably."""

    def finish(self, phase: Phase) -> None:
        """The run is over."""

    def started(self, run_id: str, rounds: Sequence[ClosedRound]) -> None:
        self.run_id = run_id
        for closed in rounds:
            self._waiting.append((closed.round_number, _scalars_of(closed)))
        self._flush()

    def round_closed(self, closed: ClosedRound) -> None:
        self._waiting.append((closed.round_number, _scalars_of(closed)))
        self._flush()

    def evaluated(self, round_number: int, site: str, evaluation: Evaluation) -> None:
        # The mean of a round is its evaluators' when those of another round begin to answer.
        if round_number not in self._evaluations:
            self._settle()
        self._evaluations.setdefault(round_number, {})[site] = evaluation
        own = means_of({site: evaluation})[1]
        self._waiting.append((round_number, {f"evaluation/{site}/{name}": value for name, value in own.items()}))
        self._flush()

    def validated(self, round_number: int, site: str, validation: Evaluation) -> None:
        own = means_of({site: validation})[1]
        self._waiting.append((round_number, {f"validation/{site}/{name}": value for name, value in own.items()}))
        self._flush()

    def ended(self, phase: Phase, message: str) -> None:
        self._settle()
        self._flush()
        if not self._failing:
            self.finish(phase)

    def _settle(self) -> None:
        """The mean of a round over its evaluators, once."""
        for number in self._evaluations.keys() - self._settled:
            self._settled.add(number)
            means = means_of(self._evaluations[number])[1]
            self._waiting.append((number, {f"evaluation/mean/{name}": value for name, value in means.items()}))

    def _flush(self) -> None:
        try:
            if not self._open:
                self.open(_parameters_of(self.context))
                self._open = True
            while self._waiting:
                number, scalars = self._waiting[0]
                self.write(number, {name: value for name, value in scalars.items() if math.isfinite(value)})
                self._waiting.popleft()
        except Exception as error:  # noqa: BLE001
            # Services and their libraries raise what they like; the run goes on.
            if not self._failing:
                logger.warning(
                    "%s does not take what is tracked (%s: %s). The run goes on, and it is tried again with every "
                    "round; metrics.jsonl in the run folder has the same",
                    type(self).__name__,
                    type(error).__name__,
                    error,
                )
            self._failing = True
        else:
            if self._failing:
                logger.info("%s takes what is tracked again", type(self).__name__)
            self._failing = False


def _scalars_of(closed: ClosedRound) -> dict[str, float]:
    scalars: dict[str, float] = {
        "round/sites": len(closed.contributions),
        "round/rows": closed.samples,
        "round/seconds": closed.seconds,
        "round/bytes_received": closed.bytes_received,
    }
    return scalars if closed.loss is None else scalars | {"round/training_loss": closed.loss}


def _parameters_of(context: ObserverContext) -> dict[str, str]:
    """The run's settings, by name, as text."""

    def text(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return {name: text(value) for name, value in flat(context.spec).items()}
