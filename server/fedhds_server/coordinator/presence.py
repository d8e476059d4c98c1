"""Which sites are present: their sessions, when each was heard last, and whose long polls wait for work."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from typing import TYPE_CHECKING

from fedhds.errors import Evicted, SessionLost, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds_server.run.events import SiteHeard, SiteSilent
from fedhds_server.run.membership import session_digest
from fedhds_server.run.state import RunState, Site, SiteState, Task

if TYPE_CHECKING:
    from fedhds_server.coordinator.coordinator import Coordinator

# Uploads of a site that are remembered: it makes one at a time, and a new one for each task.
_MAX_UPLOADS = 8
STOPPING = "the coordinator is stopping; try again when it is back"


class Presence:
    """What the coordinator knows of its sites besides the saved state; all of it may be lost."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._waiting: dict[str, asyncio.Event] = {}
        self._heard_at: dict[str, float] = {}
        self._received: Counter[str] = Counter()
        self._sessions: dict[str, str] = {}
        self._uploads: dict[str, deque[str]] = {}
        self._paused = coordinator.state.paused
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

    def uploads(self, site: str, artifact: Artifact) -> None:
        """Notes that a site sends the bytes of an artifact."""
        recent = self._uploads.setdefault(site, deque(maxlen=_MAX_UPLOADS))
        if artifact.digest not in recent:
            recent.append(artifact.digest)

    def uploaded(self, site: str, artifact: Artifact) -> bool:
        """Whether the site itself sent these bytes lately: nobody's word deletes anything else."""
        return artifact.digest in self._uploads.get(site, ())

    def count_bytes(self, state: RunState) -> None:
        """Puts the counts into the state that is about to be saved."""
        for site, size in self._received.items():
            if site in state.sites:
                state.sites[site].bytes_received += size
        self._received.clear()

    async def site_of(self, session: str) -> Site:
        """The site that has `session`, noted as alive; raises SessionLost or Evicted."""
        if self._coordinator.stopped:
            raise StorageError(STOPPING)
        name = self._sessions.get(session_digest(session))
        if name is None:
            raise SessionLost("the session is unknown, or another process of this site has taken over; enroll again")
        self.note(name)
        site = self._state.sites[name]
        if site.state is SiteState.EVICTED:
            raise Evicted(f"an operator has evicted this site: {site.last_error}")
        if not site.live:
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
            event = self._waiting[site.name] = asyncio.Event()
            try:
                await asyncio.wait_for(event.wait(), remaining)
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

    def _dismissed(self, site: str) -> bool:
        """Whether a site has nothing to wait for any more."""
        return self._state.phase.over or self._state.sites[site].state is SiteState.EVICTED
