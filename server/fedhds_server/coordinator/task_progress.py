"""Whether sites that have work get on with it: a heartbeat says that a site is alive, not that it works."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from fedhds_server.run.state import RunState

# A site that is restarted begins again, so its progress may fall; one pass and a half over a task is honest. It bounds
# for how long a site that lies about its progress can keep a task.
_MAX_ADVANCES = 150
_OVER = frozenset({""})


@dataclass
class _Work:
    """What one site has to do, and how it gets on."""

    tasks: Set[str]
    stalled_s: float = 0.0
    advances: int = 0
    reported: tuple[str, int] = ("", 0)


class TaskProgress:
    """For how long each site has made no progress with its open tasks, or with taking the final adapter.

    Only time counts in which the site is live. Progress is a higher whole percent of a task than the heartbeat before
    had, at most `_MAX_ADVANCES` times until one of the site's tasks is closed.
    """

    def __init__(self) -> None:
        self._work: dict[str, _Work] = {}

    def heard(self, site: str, task_id: str, share: float) -> None:
        """A heartbeat of a site: the share that is done of its open task, 0 to 1."""
        work = self._work.get(site)
        if work is None or task_id not in work.tasks:
            return
        percent = int(100 * min(max(share, 0.0), 1.0)) if math.isfinite(share) else 0
        before, work.reported = work.reported, (task_id, percent)
        if percent > (before[1] if before[0] == task_id else 0) and work.advances < _MAX_ADVANCES:
            work.advances += 1
            work.stalled_s = 0.0

    def passed(self, state: RunState, elapsed_s: float) -> None:
        """Time has passed."""
        open_tasks = _tasks_by_site(state)
        if state.phase.over:
            open_tasks = {name: _OVER for name, site in state.sites.items() if site.live}
        for name in self._work.keys() - open_tasks.keys():
            del self._work[name]
        for name, tasks in open_tasks.items():
            work = self._work.get(name)
            if work is None or work.tasks - tasks:
                work = self._work[name] = _Work(tasks)
            else:
                work.tasks = tasks
                work.stalled_s += elapsed_s * state.sites[name].live

    def stalled(self, timeout_s: float) -> list[str]:
        """Sites that have made no progress for `timeout_s`, by name."""
        return sorted(name for name, work in self._work.items() if work.stalled_s >= timeout_s)


def _tasks_by_site(state: RunState) -> Mapping[str, Set[str]]:
    tasks: dict[str, set[str]] = {}
    for task in state.tasks.values():
        tasks.setdefault(task.site, set()).add(task.id)
    return tasks
