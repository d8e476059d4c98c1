"""What any store of a run's state must hold to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedhds_server.run.state import RunState


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One line of a run's history for people; `at` is wall time in seconds."""

    at: float
    message: str
    trouble: bool = False


class Store(ABC):
    """Keeps one run: its state as one value, its journal, and which coordinator leads it.

    Implementations MUST make `save` atomic and durable: after it returned, state and entries survive a power cut;
    after it raised or was cut short, `load` gives the previous state. They MUST raise StorageError when the medium
    fails, and MUST be usable again once it works. They MUST be safe to use from several threads.

    The lease decides who leads where several coordinators open the same run. Its time MUST be told by one clock for
    all of them, never by a coordinator's own. A store that lost the lease MUST NOT be able to save, however late it
    notices: whether it leads is checked in the transaction that saves.
    """

    @abstractmethod
    def load(self) -> RunState | None:
        """The last saved state; None in a new store."""

    @abstractmethod
    def save(self, state: RunState, entries: Sequence[JournalEntry] = ()) -> None:
        """Replaces the state and appends to the journal, in one transaction; raises NotLeading without the lease."""

    @abstractmethod
    def journal(self) -> list[JournalEntry]:
        """All entries, oldest first."""

    @abstractmethod
    def up_to_date(self) -> bool:
        """Whether the medium has this program's schema now; MUST ask it, and raise StorageError when it is away."""

    @abstractmethod
    def acquire(self, holder: str, address: str, lease_s: float) -> bool:
        """Takes the lease, unless it is another holder's and has not run out; whether it is taken.

        At most one of those who ask at the same time MUST get it. A store that gets it MUST shut out every store that
        had it before, also one of the same `holder`: that one gets it at once, as the caller vouches that the
        holder's former process is gone. `address` tells people where the leader is.
        """

    @abstractmethod
    def renew(self) -> None:
        """Lets the lease last `lease_s` seconds from now; raises NotLeading when another has taken it."""

    @abstractmethod
    def release(self) -> None:
        """Gives the lease up, so that another gets it at once; nothing happens without one."""

    @abstractmethod
    def leader(self) -> str:
        """The address of the coordinator that has the lease; empty when none has."""

    @abstractmethod
    def close(self) -> None:
        """Releases the medium."""
