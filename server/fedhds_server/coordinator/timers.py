"""What only time tells: silent and idle sites, deadlines, retries, and when the coordinator may end."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

from fedhds_server.coordinator.task_progress import TaskProgress
from fedhds_server.counters import count_failure
from fedhds_server.run.events import DeadlineReached, RetryDue, TaskFailed
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import Site, SiteState

if TYPE_CHECKING:
    from fedhds_server.coordinator.coordinator import Coordinator

# `fedhds status --watch` asks every 2 s; who watches should see the end.
_WATCHED_S = 5.0
# A site that has a part in the adapter should have it, also when it is restarted at the end.
_CONTRIBUTOR_TIMEOUTS = 3
# A site that looks for its coordinator pauses for up to 5 s: no wait is shorter than a few of its tries.
_MIN_WAIT_S = 15.0


class Timers:
    """Monotonic times of what is open; a coordinator that starts again counts from the start."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.settled = asyncio.Event()
        """The run is over and no site needs this coordinator any more."""
        self.progress = TaskProgress()
        """Of every site that has work."""
        # A run that is started again when it is over is there for sites that do not have the adapter.
        self._started_over = coordinator.state.phase.over
        self._over_since: float | None = None
        self._watched_at = -math.inf
        self._stage, self._opened_at = "", 0.0
        self._short_since: float | None = None

    @property
    def deadline_s(self) -> float | None:
        """Seconds until the open stage closes with its quorum; None without a deadline."""
        state = self._coordinator.state
        deadline = state.spec.rounds.deadline
        if not deadline or state.stage is None or state.stage.closed or state.stage.name != self._stage:
            return None
        return max(0.0, self._opened_at + deadline - time.monotonic())

    def watched(self) -> None:
        """Notes that somebody asked for the run's status."""
        self._watched_at = time.monotonic()

    async def run(self) -> None:
        """Tells the machine, until cancelled."""
        rounds = self._coordinator.state.spec.rounds
        timeout_s = rounds.heartbeat_timeout
        tick = min(1.0, timeout_s / 5, (rounds.deadline or timeout_s) / 5, rounds.task_timeout / 5)
        last = time.monotonic()
        while True:
            await asyncio.sleep(tick)
            now = time.monotonic()
            await self._watch_stage(now, now - last)
            await self._watch_tasks(min(now - last, timeout_s))
            last = now
            await self._coordinator.presence.report_silence()
            await self._coordinator.presence.end_refused()
            if self._coordinator.state.phase.over:
                # Through the inbox, as the state may be ahead of what is saved.
                await self._coordinator.post(lambda _: None)

    def settle(self) -> None:
        """Sets `settled` when every site has the final adapter and has gone.

        Sites that are away are waited for during one heartbeat time-out if they are lost, during three if they have a
        part in the adapter; sites that are here until they stand still; people who watch for a moment.
        """
        state, rounds = self._coordinator.state, self._coordinator.state.spec.rounds
        if not state.phase.over:
            return
        now = time.monotonic()
        self._over_since = self._over_since or now
        over_s = now - self._over_since
        contributors = {site for closed in state.closed_rounds for site in closed.contributions}
        idle = set(self.progress.stalled(rounds.task_timeout))

        def awaited(site: Site) -> bool:
            if site.live:
                # One that has the adapter leaves once it knows that this was noted; until then it may ask again.
                return site.name not in idle
            if site.delivered or site.state is SiteState.EVICTED:
                return False
            if site.name in contributors:
                return over_s <= max(_CONTRIBUTOR_TIMEOUTS * rounds.heartbeat_timeout, _MIN_WAIT_S)
            lost = site.state is SiteState.LOST or self._started_over
            return lost and over_s <= max(rounds.heartbeat_timeout, _MIN_WAIT_S)

        if over_s < _WATCHED_S and self._watched_at > self._over_since - _WATCHED_S:
            return
        if not any(map(awaited, state.sites.values())):
            self.settled.set()

    async def _watch_tasks(self, elapsed_s: float) -> None:
        """Fails the tasks of sites that make no progress; not for a time in which this process itself stood still."""
        state, timeout_s = self._coordinator.state, self._coordinator.state.spec.rounds.task_timeout
        if state.paused is not None:
            return
        self.progress.passed(state, elapsed_s)
        idle = set(self.progress.stalled(timeout_s))
        for task in [task for task in state.tasks.values() if task.site in idle]:
            count_failure(task.kind, "TaskError")
            reason = f"no progress for {timeout_s:g} s, the run's --task-timeout"
            await self._coordinator.post(TaskFailed(time.time(), task.id, reason))

    async def _watch_stage(self, now: float, elapsed: float) -> None:
        state, rounds = self._coordinator.state, self._coordinator.state.spec.rounds
        name = state.stage.name if state.stage else ""
        if name != self._stage:
            self._stage, self._opened_at, self._short_since = name, now, None
        progress = CohortProgress.of(state)
        if progress is None:
            return
        if state.paused is not None:
            self._opened_at += elapsed
            self._short_since = None
            return
        if rounds.deadline and not progress.deadline_reached and now - self._opened_at >= rounds.deadline:
            await self._coordinator.post(DeadlineReached(time.time(), name))
        if not (progress.short and progress.failed):
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since >= rounds.heartbeat_timeout:
            self._short_since = None
            await self._coordinator.post(RetryDue(time.time(), name))
