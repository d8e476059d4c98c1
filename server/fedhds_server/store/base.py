"""What any store of a run's state must hold to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedhds_server.state import RunState


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of a run's history for people; `at` is wall time in seconds."""

    at: float
    message: str
    trouble: bool = False


class Store(ABC):
    """Keeps one run: its state as one value, and its journal.

    Implementations MUST make `save` atomic and durable: after it returned, state and entries survive a power cut;
    after it raised or was cut short, `load` gives the previous state. They MUST raise StorageError, and nothing else,
    when the medium fails, and MUST be usable again once it works.
    """

    @abstractmethod
    def load(self) -> RunState | None:
        """The last saved state; None in a new store."""

    @abstractmethod
    def save(self, state: RunState, entries: Sequence[JournalEntry] = ()) -> None:
        """Replaces the state and appends to the journal, in one transaction."""

    @abstractmethod
    def journal(self) -> list[JournalEntry]:
        """All entries, oldest first."""

    @abstractmethod
    def close(self) -> None:
        """Releases the medium."""
