"""What an open selection or round has collected from its cohort, and whether that is enough to close it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from fedhds_server.state import Phase, RunState, TaskKind

_MOST_NAMES = 5


@dataclass(frozen=True, slots=True)
class Collection:
    """The cohort of an open phase, parted by what its sites have done."""

    kind: TaskKind
    answered: frozenset[str]
    """Delivered, or rightly had nothing to give."""
    working: frozenset[str]
    """Live, with an open task."""
    failed: frozenset[str]
    """Their task failed or its result was rejected."""
    away: frozenset[str]
    """The others: lost or left; each may yet come back and deliver."""
    target: int
    """Answers that close the phase at once: the cohort's size before over-sampling."""
    quorum: int
    """Least answers that close it at all."""
    deadline_reached: bool

    @classmethod
    def of(cls, state: RunState) -> Self | None:
        """What the open phase collects; None where it collects nothing."""
        if state.phase is Phase.SELECTING:
            kind, came = TaskKind.SELECT, set(state.reports)
        elif state.phase is Phase.TRAINING:
            kind, came = TaskKind.TRAIN, set(state.updates)
        else:
            return None
        cohort = frozenset(state.cohort)
        answered = cohort & (came | set(state.empty))
        mine = {task.site for task in state.tasks.values() if task.kind is kind}
        working = frozenset(site for site in cohort - answered if site in mine and state.sites[site].live)
        failed = cohort & set(state.failed) - answered - working
        away = cohort - answered - working - failed
        quorum = state.spec.quorum_of(state.target)
        return cls(kind, answered, working, failed, away, state.target, quorum, state.deadline_reached)

    @property
    def complete(self) -> bool:
        """Whether the phase closes now: with what came, or with nothing when all that could be tried has failed."""
        if not self.answered and self.failed:
            return not self.working and not self.away
        if self.kind is TaskKind.TRAIN and len(self.answered) >= max(self.target, self.quorum):
            return True
        return len(self.answered) >= self.quorum and (self.deadline_reached or not self.working)

    @property
    def short(self) -> bool:
        """Whether it cannot close, and nobody who is here works on it."""
        return not self.complete and not self.working

    @property
    def message(self) -> str:
        """How it stands, for people."""
        things = "updates" if self.kind is TaskKind.TRAIN else "reports"
        so_far = f"{len(self.answered)} of {max(self.target, self.quorum)} {things}"
        if not self.short:
            return f"{so_far}, waiting for {listed(self.working)}"
        parts = [f"waits for its quorum: {len(self.answered)} of at least {self.quorum} {things}"]
        parts += [f"away: {listed(self.away)}"] * bool(self.away)
        parts += [f"failed, will be asked again: {listed(self.failed)}"] * bool(self.failed)
        return "; ".join(parts)


def listed(names: Iterable[str]) -> str:
    """Names for a message; many are abbreviated."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_NAMES
    return ", ".join(ordered[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "") if ordered else "nobody"


def cohort_size(count: int, fraction: float) -> int:
    """Sites in a cohort out of `count` (at least one): max(1, round(fraction * count))."""
    return min(count, max(1, math.floor(fraction * count + 0.5)))


def draw(sites: Iterable[str], size: int, *, seed: int, round_number: int) -> list[str]:
    """`size` of `sites`, uniformly, in name order.

    Sites are ranked by a hash of seed, round and name, so that the draw depends on no order, library or version.
    """
    ranked = sorted(sites, key=lambda site: hashlib.sha256(f"{seed}/{round_number}/{site}".encode()).digest())
    return sorted(ranked[:size])
