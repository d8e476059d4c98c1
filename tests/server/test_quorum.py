"""When selections and rounds close: quorum, deadline, over-sampling, substitutes; and what operators may do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedhds.spec import RunSpec
from fedhds.v2 import selection_pb2
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    Aggregate,
    DeadlineReached,
    Discard,
    NothingToGive,
    Record,
    ReportReceived,
    ResultRejected,
    RetryDue,
    RoundAggregated,
    RunPaused,
    RunResumed,
    RunStopped,
    Select,
    SelectionMade,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteSilent,
    TaskFailed,
    WriteCheckpoint,
)
from fedhds_server.run.quorum import Collection
from fedhds_server.run.state import Phase, RunState, SiteState, TaskKind
from tests.server.test_rounds import ALL_ROWS, artifact, join, machine, phase, started, update, work


def fail(run: RunMachine, site: str) -> list[Any]:
    return run.handle(TaskFailed(4.0, f"train/{run.state.round}/{site}", "no memory"))


def deadline(run: RunMachine) -> list[Any]:
    return run.handle(DeadlineReached(9.0, run.state.opening))


def test_a_round_waits_for_its_quorum_whoever_is_away() -> None:
    run = started("abc", quorum="2")
    run.handle(SiteSilent(5.0, "b"))
    run.handle(SiteLeft(5.0, "c"))
    assert work(update(run, "a")) == []
    assert run.state.message == "round 1 of 2: waits for its quorum: 1 of at least 2 updates; away: b, c"
    run.handle(SiteHeard(6.0, "b"))
    assert work(update(run, "b")) == [Aggregate(1)]


def test_a_site_that_left_and_comes_back_gets_its_task_again_when_the_quorum_needs_it() -> None:
    run = started("ab", quorum="100%")
    update(run, "a")
    run.handle(SiteLeft(5.0, "b"))
    assert run.state.tasks == {}
    join(run, "b")
    assert set(run.state.tasks) == {"train/1/b"}
    assert work(update(run, "b")) == [Aggregate(1)]


def test_a_round_closes_at_its_deadline_with_its_quorum_and_answers_the_others_as_late() -> None:
    run = started("abc", quorum="2", deadline=30)
    update(run, "a")
    assert work(deadline(run)) == []
    assert work(update(run, "b")) == [Aggregate(1)]
    assert run.next_task("c") is None
    assert update(run, "c") == []


def test_a_deadline_closes_what_has_its_quorum_already() -> None:
    run = started("abc", quorum="2", deadline=30)
    update(run, "a")
    update(run, "b")
    assert phase(run) is Phase.TRAINING
    assert work(deadline(run)) == [Aggregate(1)]


def test_a_deadline_of_another_round_changes_nothing() -> None:
    run = started("abc", deadline=30)
    opening = run.state.opening
    for site in "abc":
        update(run, site)
    run.handle(RoundAggregated(5.0, artifact(1)))
    update(run, "a")
    assert run.handle(DeadlineReached(9.0, opening)) == []
    assert not run.state.deadline_reached


def test_an_oversampled_round_closes_with_as_many_updates_as_its_cohort_without() -> None:
    run = started("abcdefgh", cohort_fraction=0.5, oversample=0.25)
    assert len(run.state.cohort) == 5
    for site in run.state.cohort[:3]:
        assert work(update(run, site)) == []
    assert work(update(run, run.state.cohort[4])) == [Aggregate(1)]
    assert run.state.tasks == {}


@pytest.mark.parametrize(
    ("sites", "fraction", "oversample", "drawn", "target"), [(3, 1, 0.5, 3, 3), (9, 0.3, 0.1, 4, 3)]
)
def test_oversampling_keeps_the_target(sites: int, fraction: float, oversample: float, drawn: int, target: int) -> None:
    run = started("abcdefghi"[:sites], cohort_fraction=fraction, oversample=oversample)
    assert (len(run.state.cohort), run.state.target) == (drawn, target)


def test_a_cohort_is_never_smaller_than_the_quorum() -> None:
    run = started("abcdef", cohort_fraction=0.1, quorum="3")
    assert len(run.state.cohort) == 3
    assert [work(update(run, site)) for site in run.state.cohort] == [[], [], [Aggregate(1)]]


def test_another_site_is_asked_in_the_place_of_one_that_is_away() -> None:
    run = started("abcd", cohort_fraction=0.5, quorum="2")
    first, second = run.state.cohort
    update(run, first)
    run.handle(SiteSilent(5.0, second))
    (third,) = {task.site for task in run.state.tasks.values()} - {second}
    assert run.state.cohort == sorted([first, second, third])
    # The one that is away may still come back first.
    run.handle(SiteHeard(6.0, second))
    assert work(update(run, second)) == [Aggregate(1)]


def test_failed_sites_are_asked_again_when_the_quorum_needs_them() -> None:
    run = started("ab", quorum="2")
    update(run, "a")
    fail(run, "b")
    assert run.state.message.endswith("1 of at least 2 updates; failed, will be asked again: b")
    assert run.state.tasks == {}
    run.handle(RetryDue(99.0, run.state.opening))
    assert set(run.state.tasks) == {"train/1/b"}
    assert work(update(run, "b")) == [Aggregate(1)]


def test_sites_that_have_nothing_to_give_count_as_answers() -> None:
    run = started("ab", quorum="100%")
    update(run, "a")
    assert work(run.handle(NothingToGive(5.0, "train/1/b"))) == [Aggregate(1)]
    run.handle(RoundAggregated(6.0, artifact(1)))
    assert run.state.closed_rounds[0].contributions == {"a": 5}


def test_a_selection_waits_for_its_quorum_too() -> None:
    run = machine(needs_reports=True, min_sites=3, quorum="80%")
    for site in "abc":
        join(run, site)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    for site in "ab":
        run.handle(ReportReceived(3.0, f"select/0/{site}", selection_pb2.ClusterReport()))
    run.handle(SiteSilent(4.0, "c"))
    assert phase(run) is Phase.SELECTING
    assert "2 of at least 3 reports; away: c" in run.state.message
    run.handle(SiteHeard(5.0, "c"))
    assert work(run.handle(ReportReceived(6.0, "select/0/c", selection_pb2.ClusterReport()))) == [Select(0, ("a", "b", "c"))]


def test_a_site_that_restarts_is_drawn_while_it_loads_its_model() -> None:
    from fedhds_server.run.events import SiteConnected

    run = started("ab", quorum="100%")
    update(run, "a")
    update(run, "b")
    run.handle(SiteConnected("b", "", "new session"))
    run.handle(RoundAggregated(5.0, artifact(1)))
    assert run.state.cohort == ["a", "b"]


def test_three_rejected_results_put_a_site_into_quarantine_and_the_round_goes_on() -> None:
    run = started("ab", rounds=9)
    for number in (1, 2, 3):
        update(run, "a")
        assert work(run.handle(ResultRejected(4.0, f"train/{number}/b", "not finite"))) == [Aggregate(number)]
        run.handle(RoundAggregated(5.0, artifact(number)))
    assert run.state.sites["b"].quarantined
    assert run.state.sites["b"].live
    assert run.state.cohort == ["a"]
    assert all("b" not in closed.contributions for closed in run.state.closed_rounds)


def test_a_site_that_fails_is_not_quarantined() -> None:
    run = started("ab", rounds=9)
    for number in (1, 2, 3, 4):
        update(run, "a")
        fail(run, "b")
        run.handle(RoundAggregated(5.0, artifact(number)))
    assert run.state.cohort == ["a", "b"]


def test_an_evicted_site_and_its_update_are_out_and_stay_out() -> None:
    run = started("abc", quorum="100%")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteEvicted(5.0, "a", "withdrew its consent"))) == [Discard(artifact(7))]
    assert work(update(run, "c")) == [Aggregate(1)]
    assert set(run.state.updates) == {"b", "c"}
    run.handle(RoundAggregated(6.0, artifact(1)))
    assert run.state.cohort == ["b", "c"]
    assert run.state.sites["a"].state is SiteState.EVICTED
    assert run.handle(SiteSilent(7.0, "a")) == []


def test_eviction_of_the_last_site_that_works_closes_the_round() -> None:
    run = started("ab")
    update(run, "a")
    assert work(run.handle(SiteEvicted(5.0, "b", "broken"))) == [Aggregate(1)]


def test_eviction_of_everybody_leaves_a_round_that_waits() -> None:
    run = started("ab")
    for site in "ab":
        run.handle(SiteEvicted(5.0, site, "broken"))
    assert phase(run) is Phase.TRAINING
    assert "waits for its quorum" in run.state.message
    # Nobody else has rows of the one selection: an operator can only stop such a run.
    run.handle(RunStopped(6.0, "no site is left"))
    assert phase(run) is Phase.STOPPED


def test_an_eviction_while_the_strategy_works_keeps_the_site_out_of_training() -> None:
    run = machine()
    join(run, "a")
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    run.handle(SiteEvicted(3.0, "a", "broken"))
    run.handle(SelectionMade(4.0, 0, {"a": ALL_ROWS, "b": ALL_ROWS}))
    assert set(run.state.tasks) == {"train/1/b"}


def test_stopping_ends_the_run_with_the_adapter_as_it_is() -> None:
    run = started(rounds=9)
    update(run, "a")
    update(run, "b")
    run.handle(RoundAggregated(5.0, artifact(1)))
    update(run, "a")
    assert work(run.handle(RunStopped(6.0, "good enough (alice)"))) == [Discard(artifact(7)), WriteCheckpoint()]
    assert phase(run) is Phase.STOPPED
    assert run.state.phase.over
    assert (run.state.tasks, run.state.updates) == ({}, {})
    assert run.state.adapters[max(run.state.adapters)] == artifact(1)
    assert run.handle(RunStopped(7.0, "again")) == []
    # What was in work when it ended changes nothing.
    assert run.handle(RoundAggregated(8.0, artifact(2))) == []


def test_a_pause_and_its_end_are_in_the_journal() -> None:
    run = started()
    told = [*run.handle(RunPaused("maintenance")), *run.handle(RunResumed("done")), *run.handle(RunResumed("twice"))]
    assert [note.message for note in told if isinstance(note, Record)] == [
        "the run is paused: maintenance",
        "the run goes on: done",
    ]


@pytest.mark.parametrize("quorum", ["0", "-1", "101%", "0%", "half", "1.5", ""])
def test_a_quorum_is_a_count_or_a_share(quorum: str) -> None:
    with pytest.raises(ValidationError, match="quorum"):
        RunSpec.of(model="m", rounds=1, quorum=quorum)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["update", "fail", "reject", "nothing", "silent", "heard", "leave", "join", "evict"]),
        st.sampled_from("abcdef"),
    )
    | st.tuples(st.sampled_from(["deadline", "retry", "aggregated"]), st.just("")),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(
    EVENTS,
    st.sampled_from(["1", "2", "4", "50%", "100%"]),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_whatever_happens_a_round_has_its_quorum_or_all_of_it_failed(
    events: list[tuple[str, str]], quorum: str, fraction: float, oversample: float
) -> None:
    run = started("abcdef", rounds=50, quorum=quorum, cohort_fraction=fraction, oversample=oversample, deadline=1)
    for number, (kind, site) in enumerate(events):
        if run.state.phase.over:
            break
        before = Collection.of(run.state)
        at, task = float(number), f"train/{run.state.round}/{site}"
        match kind:
            case "update":
                instructions = update(run, site)
            case "fail":
                instructions = run.handle(TaskFailed(at, task, "no memory"))
            case "reject":
                instructions = run.handle(ResultRejected(at, task, "not finite"))
            case "nothing":
                instructions = run.handle(NothingToGive(at, task))
            case "silent":
                instructions = run.handle(SiteSilent(at, site))
            case "heard":
                instructions = run.handle(SiteHeard(at, site))
            case "leave":
                instructions = run.handle(SiteLeft(at, site))
            case "join" if run.state.sites[site].state is not SiteState.EVICTED:
                instructions = join(run, site)
            case "evict":
                instructions = run.handle(SiteEvicted(at, site, "broken"))
            case "deadline":
                instructions = run.handle(DeadlineReached(at, run.state.opening))
            case "retry":
                instructions = run.handle(RetryDue(at, run.state.opening))
            case "aggregated":
                instructions = run.handle(RoundAggregated(at, artifact(number)))
            case _:
                continue
        state = run.state
        # It can always be saved and read back.
        assert RunState.model_validate_json(state.model_dump_json()) == state
        # Only live sites that the run still wants hold work that changes the adapter, or such as may come back.
        training = [task for task in state.tasks.values() if task.kind is TaskKind.TRAIN]
        assert all(not state.sites[task.site].shut_out and task.site in state.cohort for task in training)
        assert len({task.site for task in training}) == len(training)
        assert not {task.site for task in training} & set(state.updates)
        if any(isinstance(instruction, Aggregate) for instruction in instructions):
            assert before is not None
            assert phase(run) is Phase.AGGREGATING
            answered = len(set(state.updates) | set(state.empty))
            assert answered >= state.spec.rounds.quorum_of(state.target) or (not answered and state.failed)
        after = Collection.of(state)
        if after is not None:
            # Nothing is left undone: it closes as soon as it can, and when it cannot, somebody works or is missing.
            assert not after.complete
            able = [name for name in state.coresets if state.sites[name].live and not state.sites[name].shut_out]
            idle = set(able) - after.answered - after.failed - after.working
            assert after.working or not idle
