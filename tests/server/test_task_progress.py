"""Sites that are alive and make no progress: what counts as progress, for how long, and what follows."""

from __future__ import annotations

import math

import pytest

from fedhds_server.coordinator.task_progress import TaskProgress
from fedhds_server.run.events import AdapterDrawn, SiteHeard, SiteSilent, TaskFailed
from fedhds_server.run.state import Phase
from tests.support.machine import aggregate, artifact, doing, evaluation, join, machine, select, started, update

TASK = "train/1/b"


def test_a_site_stalls_when_no_percent_of_its_task_is_done_in_time() -> None:
    run, progress = started(), TaskProgress()
    progress.passed(run.state, 5.0)
    for share in (0.011, 0.012, 0.019, math.nan, math.inf, -1.0, 0.0):
        progress.heard("a", "train/1/a", share)
    for second in range(9):
        progress.heard("b", TASK, 0.0101 * second)
        progress.passed(run.state, 1.0)
    assert progress.stalled(9.0) == ["a"]
    assert progress.stalled(2.0) == ["a"]
    progress.heard("a", "train/1/a", 0.5)
    assert progress.stalled(9.0) == []


def test_a_restarted_site_may_begin_again_but_lies_end() -> None:
    run, progress = started(), TaskProgress()
    progress.passed(run.state, 1.0)
    for attempt in range(10_000):
        # Up and down, or on other tasks: every second beat is an advance.
        progress.heard("b", TASK, attempt % 2)
        progress.heard("b", "train/1/a", 1.0)
        progress.passed(run.state, 1.0)
        if "b" in progress.stalled(60.0):
            break
    assert 300 <= attempt <= 2 * 150 + 60


def test_neither_absence_nor_an_accepted_result_is_a_stall() -> None:
    run, progress = started(rounds=2), TaskProgress()
    progress.passed(run.state, 1.0)
    run.handle(SiteSilent(3.0, "a"))
    progress.passed(run.state, 100.0)
    assert progress.stalled(100.0) == ["b"]
    run.handle(SiteHeard(4.0, "a"))
    for site in "ab":
        update(run, site)
    progress.passed(run.state, 100.0)
    assert progress.stalled(1.0) == []
    aggregate(run, 1)
    progress.passed(run.state, 100.0)
    assert progress.stalled(1.0) == []
    progress.passed(run.state, 100.0)
    assert progress.stalled(100.0) == ["a", "b"]


def test_a_failed_evaluation_does_not_keep_the_run_from_its_end() -> None:
    run = machine(min_sites=1, rounds=1)
    join(run, "a", evaluates=True)
    join(run, "e", rows=0, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    select(run, "a")
    for site in "ae":
        evaluation(run, 0, site)
    update(run, "a")
    aggregate(run, 1)
    assert run.state.phase is Phase.FINISHING
    run.handle(TaskFailed(6.0, "evaluate/1/e", "no progress"))
    # Coming and going brings it nothing.
    run.handle(SiteSilent(7.0, "e"))
    run.handle(SiteHeard(8.0, "e"))
    assert sorted(run.state.tasks) == ["evaluate/1/a"]
    evaluation(run, 1, "a")
    assert doing(run) == "completed"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_run_that_is_over_waits_for_the_delivery_alone(share: float) -> None:
    run, progress = started(rounds=1), TaskProgress()
    for site in "ab":
        update(run, site)
    aggregate(run, 1)
    assert run.state.phase is Phase.COMPLETED
    progress.passed(run.state, 1.0)
    progress.passed(run.state, 50.0)
    progress.heard("a", "", share)
    assert progress.stalled(50.0) == (["b"] if share else ["a", "b"])
