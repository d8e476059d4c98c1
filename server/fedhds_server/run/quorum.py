"""What an open stage has collected from its cohort, and whether that is enough to close it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from fedhds_server.run.parties import parties, party_of
from fedhds_server.run.state import RunState
from fedhds_server.workflows import WORKFLOWS
from fedhds_server.workflows.base import Workflow

_MAX_NAMES = 5


@dataclass(frozen=True, slots=True)
class CohortProgress:
    """The cohort of the open stage, divided by what its sites have done; target and quorum count parties."""

    workflow: Workflow
    answered: frozenset[str]
    """Delivered, or had nothing to give."""
    working: frozenset[str]
    """Live, with an open task."""
    failed: frozenset[str]
    """Their task failed or its result was rejected."""
    disconnected: frozenset[str]
    """The others: lost or left; each may yet come back and deliver."""
    target: int
    """Answers that close the stage at once: the cohort's size before over-selection."""
    quorum: int
    """Fewest answers that close it at all."""
    deadline_reached: bool
    by_site: bool = False
    """Sites count one by one, and nobody can take the place of one."""

    @classmethod
    def of(cls, state: RunState) -> Self | None:
        """What the open stage has collected; None while none is open."""
        stage = state.stage
        if stage is None or stage.closed:
            return None
        cohort = frozenset(stage.cohort)
        answered = cohort & set(stage.replies)
        with_task = {task.site for task in state.tasks.values() if task.kind == stage.kind}
        working = frozenset(site for site in cohort - answered if site in with_task and state.sites[site].live)
        failed = cohort & set(stage.failed) - answered - working
        disconnected = cohort - answered - working - failed
        workflow = WORKFLOWS[stage.kind]
        quorum, by_site = workflow.quorum(state, stage), workflow.by_site(stage)
        return cls(
            workflow, answered, working, failed, disconnected, stage.target, quorum, stage.deadline_reached, by_site
        )

    @property
    def complete(self) -> bool:
        """Whether the stage closes now: with what came, or with nothing when all that could be tried has failed."""
        if not self.answered and self.failed:
            return not self.working and not self.disconnected
        within_reach = self.answered | self.working | (frozenset() if self.deadline_reached else self.disconnected)
        if self.workflow.abandons and self.failed | self.disconnected and self._count(within_reach) < self.quorum:
            return True
        answered = parties(self.answered)
        done = answered - parties(self.working)
        if self.workflow.closes_at_target and len(done) >= max(self.target, self.quorum):
            return True
        return self._count(self.answered) >= self.quorum and (self.deadline_reached or not self.working)

    def _count(self, sites: frozenset[str]) -> int:
        return len(sites) if self.by_site else len(parties(sites))

    @property
    def short(self) -> bool:
        """Whether it cannot close, and no live site works on it."""
        return not self.complete and not self.working

    @property
    def outline(self) -> str:
        """How it stands, in numbers."""
        answered = self._count(self.answered)
        if not self.short:
            return f"{answered} of {max(self.target, self.quorum)} {self.workflow.answers}"
        return f"waits for its quorum: {answered} of at least {self.quorum} {self.workflow.answers}"

    @property
    def message(self) -> str:
        """How it stands, for people who may know the sites."""
        if not self.short:
            return f"{self.outline}, waiting for {listed(self.working)}"
        parts = [self.outline]
        parts += [f"disconnected: {listed(self.disconnected)}"] * bool(self.disconnected)
        parts += [f"failed, will be asked again: {listed(self.failed)}"] * bool(self.failed)
        return "; ".join(parts)


def listed(names: Iterable[str]) -> str:
    """Names for a message; many are abbreviated."""
    ordered = sorted(names)
    more = len(ordered) - _MAX_NAMES
    return ", ".join(ordered[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "") if ordered else "no site"


def draw(sites: Iterable[str], size: int, *, seed: int, round_number: int) -> list[str]:
    """Those of `sites` that belong to `size` parties, which are drawn uniformly; in name order.

    Parties are ranked by a hash of seed, round and name, so that the draw depends on no order, library or version.
    """
    by_party: dict[str, list[str]] = {}
    for site in sites:
        by_party.setdefault(party_of(site), []).append(site)
    ranked = sorted(by_party, key=lambda party: hashlib.sha256(f"{seed}/{round_number}/{party}".encode()).digest())
    return sorted(site for party in ranked[:size] for site in by_party[party])
