"""Which sites are present: their sessions, when each was heard last, and whose long polls wait for work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import TYPE_CHECKING

from fedhds.errors import Evicted, SessionLost, StorageError
from fedhds_server.run.events import SiteHeard, SiteRevoked, SiteSilent
from fedhds_server.run.membership import session_digest
from fedhds_server.run.state import RunState, Site, SiteState, Task

if TYPE_CHECKING:
    from fedhds_server.coordinator.coordinator import Coordinator

STOPPING = "the coordinator is stopping; try again when it is back"


class Presence:
    """What the coordinator knows of its sites besides the saved state; all of it may be lost."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._waiting: dict[str, asyncio.Event] = {}
        self._heard_at: dict[str, float] = {}
        self._received: Counter[str] = Counter()
        self._sessions: dict[str, str] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._paused = coordinator.state.paused
        self._enforced = -1
        for name in coordinator.state.sites:
            self.note(name)
        self.refresh()

    @property
    def _state(self) -> RunState:
        return self._coordinator.state

    def note(self, site: str) -> None:
        """A sign of life."""
        self._heard_at[site] = time.monotonic()

    def refresh(self) -> None:
        """Takes the sessions from the saved state."""
        self._sessions = {site.session: name for name, site in self._state.sites.items()}

    def received(self, site: str, size: int) -> None:
        """Counts payload bytes that a site sent."""
        self._received[site] += size

    def turn(self, site: str) -> asyncio.Lock:
        """The lock under which a site's results are checked: one at a time, whatever the number of its calls."""
        return self._turns.setdefault(site, asyncio.Lock())

    def count_bytes(self, state: RunState) -> None:
        """Puts the counts into the state that is about to be saved."""
        for site, size in self._received.items():
            if site in state.sites:
                state.sites[site].bytes_received += size
        self._received.clear()

    def named(self, session: str, key: str | None = None) -> str:
        """The name of the site that has `session`; raises SessionLost, also for a caller whose key is another."""
        name = self._sessions.get(session_digest(session))
        if name is None or (key is not None and key != self._state.sites[name].key):
            raise SessionLost("the session is unknown, or another process of this site has taken over; enroll again")
        return name

    async def site_of(self, session: str, key: str | None = None) -> Site:
        """The site that has `session`, noted as alive; raises SessionLost or Evicted.

        `key` is the fingerprint of the caller's key, empty without TLS; None where it was compared before.
        """
        if self._coordinator.stopped:
            raise StorageError(STOPPING)
        name = self.named(session, key)
        self.note(name)
        site = self._state.sites[name]
        if site.state is SiteState.EVICTED:
            raise Evicted(f"an operator has evicted this site: {site.last_error}")
        if site.state is SiteState.LOST:
            await self._coordinator.post(SiteHeard(time.time(), name))
        return site

    async def next_task(self, site: Site, wait_s: float) -> Task | None:
        """The site's open task; None when it has none for `wait_s` seconds.

        None, too, as soon as the site is evicted, the run is over, or a pause begins or ends: the site should hear it.
        """
        deadline, paused = time.monotonic() + wait_s, self._state.paused
        while not self._dismissed(site.name):
            if self._coordinator.stopped:
                raise StorageError(STOPPING)
            task = None if self._state.paused is not None else self._coordinator.machine.next_task(site.name)
            remaining = deadline - time.monotonic()
            if task or remaining <= 0 or self._state.paused != paused:
                return task
            if earlier := self._waiting.get(site.name):
                # One call waits for a site: of a connection that broke, or of a flood, the older ones end.
                earlier.set()
            event = self._waiting[site.name] = asyncio.Event()
            try:
                await asyncio.wait_for(event.wait(), remaining)
                if self._waiting.get(site.name) is not event:
                    return None
            except TimeoutError:
                return None
            finally:
                # Another process of the site may meanwhile wait in place of this one.
                if self._waiting.get(site.name) is event:
                    del self._waiting[site.name]
        return None

    def wake(self) -> None:
        """Answers the long polls of sites that have a task, or nothing to wait for; all of them about a pause."""
        busy = {task.site for task in self._state.tasks.values()}
        news, self._paused = self._state.paused != self._paused, self._state.paused
        for site, event in self._waiting.items():
            if news or site in busy or self._dismissed(site):
                event.set()

    def wake_all(self) -> None:
        """Answers all long polls."""
        for event in self._waiting.values():
            event.set()

    async def report_silence(self) -> None:
        """Tells the machine of sites that have been silent for longer than the heartbeat time-out."""
        now, timeout_s = time.monotonic(), self._state.spec.rounds.heartbeat_timeout
        for site in list(self._state.sites.values()):
            if site.live and now - self._heard_at.setdefault(site.name, now) > timeout_s:
                await self._coordinator.post(SiteSilent(time.time(), site.name))

    async def end_refused(self) -> None:
        """Ends the sessions of sites that the operator's lists let in no more, also of those that do not call."""
        admission = self._coordinator.admission
        admission.refresh()
        if admission.version == self._enforced:
            return
        version = admission.version
        for site in list(self._state.sites.values()):
            if site.session and (reason := admission.refusal(site.name, site.key, site.serial)):
                await self._coordinator.post(SiteRevoked(time.time(), site.name, reason))
        self._enforced = version

    def _dismissed(self, site: str) -> bool:
        """Whether a site has nothing to wait for any more."""
        known = self._state.sites[site]
        return self._state.phase.over or known.state is SiteState.EVICTED or not known.session
