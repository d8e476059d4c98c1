"""What a site's process counts as it happens, and what its sites can be doing."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

from fedhds.runtime.metrics import Counted

# What a site does besides its tasks, whose kinds are its other activities.
ENROLLING = "enrolling"  # reaches for the coordinator, loads the base model
WAITING = "waiting"
ENDED = "ended"


TASK_SECONDS = Histogram(
    "fedhds_client_task_seconds",
    "Time for a task from its arrival to the coordinator's answer to its result, waiting for other sites of this "
    "process included.",
    ("task",),
    buckets=(1, 5, 10, 30, 60, 300, 900, 1800, 3600, 7200, 14400),
)
TASK_FAILURES = Counter(
    "fedhds_client_tasks_failed", "Tasks that failed, by the class of the error.", ("task", "error")
)
COUNTED: tuple[Counted, ...] = (TASK_SECONDS, TASK_FAILURES)
