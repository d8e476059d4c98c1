"""When selections and rounds close: quorum, deadline, over-selection, substitutes; and what operators may do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedhds.spec import RunSpec
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterUpdated,
    DeadlineReached,
    Discard,
    Instruction,
    Resolve,
    ResultRejected,
    RetryDue,
    RunPaused,
    RunResumed,
    RunStopped,
    SiteConnected,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteSilent,
    StageResolved,
    TaskFailed,
    WriteCheckpoint,
)
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import Phase, RunState, SiteState
from tests.support.machine import (
    aggregate,
    artifact,
    doing,
    enrolled,
    fail,
    join,
    notes,
    nothing,
    report,
    select,
    stage_of,
    started,
    update,
    work,
)


def deadline(run: RunMachine) -> list[Instruction]:
    return run.handle(DeadlineReached(9.0, stage_of(run).name))


def test_a_round_waits_for_its_quorum_whoever_is_away() -> None:
    run = started("abc", quorum="2")
    run.handle(SiteSilent(5.0, "b"))
    run.handle(SiteLeft(5.0, "c"))
    assert work(update(run, "a")) == []
    assert run.state.message == "round 1 of 2: waits for its quorum: 1 of at least 2 updates; disconnected: b, c"
    run.handle(SiteHeard(6.0, "b"))
    assert work(update(run, "b")) == [Resolve("train/1")]


def test_a_site_that_left_and_comes_back_gets_its_task_again_when_the_quorum_needs_it() -> None:
    run = started("ab", quorum="100%")
    update(run, "a")
    run.handle(SiteLeft(5.0, "b"))
    assert run.state.tasks == {}
    join(run, "b")
    assert set(run.state.tasks) == {"train/1/b"}
    assert work(update(run, "b")) == [Resolve("train/1")]


def test_a_round_closes_at_its_deadline_with_its_quorum_and_answers_the_others_as_late() -> None:
    run = started("abc", quorum="2", deadline=30)
    update(run, "a")
    assert work(deadline(run)) == []
    assert work(update(run, "b")) == [Resolve("train/1")]
    assert run.next_task("c") is None
    assert update(run, "c") == []


def test_a_deadline_closes_what_has_its_quorum_already() -> None:
    run = started("abc", quorum="2", deadline=30)
    update(run, "a")
    update(run, "b")
    assert doing(run) == "training"
    assert work(deadline(run)) == [Resolve("train/1")]


def test_a_deadline_of_another_round_changes_nothing() -> None:
    run = started("abc", deadline=30)
    earlier = stage_of(run).name
    for site in "abc":
        update(run, site)
    aggregate(run, 1)
    update(run, "a")
    assert run.handle(DeadlineReached(9.0, earlier)) == []
    assert not stage_of(run).deadline_reached


def test_an_over_selected_round_closes_with_as_many_updates_as_its_cohort_without() -> None:
    run = started("abcdefgh", cohort_fraction=0.5, over_selection=0.25)
    assert len(stage_of(run).cohort) == 5
    for site in stage_of(run).cohort[:3]:
        assert work(update(run, site)) == []
    assert work(update(run, stage_of(run).cohort[4])) == [Resolve("train/1")]
    assert run.state.tasks == {}


@pytest.mark.parametrize(
    ("sites", "fraction", "over_selection", "drawn", "target"), [(3, 1, 0.5, 3, 3), (9, 0.3, 0.1, 4, 3)]
)
def test_over_selection_keeps_the_target(
    sites: int, fraction: float, over_selection: float, drawn: int, target: int
) -> None:
    run = started("abcdefghi"[:sites], cohort_fraction=fraction, over_selection=over_selection)
    assert (len(stage_of(run).cohort), stage_of(run).target) == (drawn, target)


def test_a_cohort_is_never_smaller_than_the_quorum() -> None:
    run = started("abcdef", cohort_fraction=0.1, quorum="3")
    assert len(stage_of(run).cohort) == 3
    assert [work(update(run, site)) for site in stage_of(run).cohort] == [[], [], [Resolve("train/1")]]


def test_another_site_is_asked_in_the_place_of_one_that_is_away() -> None:
    run = started("abcd", cohort_fraction=0.5, quorum="2")
    first, second = stage_of(run).cohort
    update(run, first)
    run.handle(SiteSilent(5.0, second))
    (third,) = {task.site for task in run.state.tasks.values()} - {second}
    assert stage_of(run).cohort == sorted([first, second, third])
    # The one that is away may still come back first.
    run.handle(SiteHeard(6.0, second))
    assert work(update(run, second)) == [Resolve("train/1")]


def test_failed_sites_are_asked_again_when_the_quorum_needs_them() -> None:
    run = started("ab", quorum="2")
    update(run, "a")
    fail(run, "b")
    assert run.state.message.endswith("1 of at least 2 updates; failed, will be asked again: b")
    assert run.state.tasks == {}
    run.handle(RetryDue(99.0, stage_of(run).name))
    assert set(run.state.tasks) == {"train/1/b"}
    assert work(update(run, "b")) == [Resolve("train/1")]


def test_sites_that_have_nothing_to_give_count_as_answers() -> None:
    run = started("ab", quorum="100%")
    update(run, "a")
    assert work(nothing(run, "b")) == [Resolve("train/1")]
    aggregate(run, 1)
    assert run.state.closed_rounds[0].contributions == {"a": 5}


def test_a_selection_waits_for_its_quorum_too() -> None:
    run = enrolled("abc", selection_strategy="fedhds-aligned", quorum="80%")
    for site in "ab":
        report(run, site)
    run.handle(SiteSilent(4.0, "c"))
    assert doing(run) == "selecting"
    assert "2 of at least 3 reports; disconnected: c" in run.state.message
    run.handle(SiteHeard(5.0, "c"))
    assert work(report(run, "c")) == [Resolve("select/0")]
    assert sorted(stage_of(run).replies) == ["a", "b", "c"]


def test_a_site_that_restarts_is_drawn_while_it_loads_its_model() -> None:
    run = started("ab", quorum="100%")
    update(run, "a")
    update(run, "b")
    run.handle(SiteConnected("b", "", "new session"))
    aggregate(run, 1)
    assert stage_of(run).cohort == ["a", "b"]


def test_three_rejected_results_put_a_site_into_quarantine_and_the_round_goes_on() -> None:
    run = started("ab", rounds=9)
    for number in (1, 2, 3):
        update(run, "a")
        assert work(run.handle(ResultRejected(4.0, f"train/{number}/b", "not finite"))) == [Resolve(f"train/{number}")]
        aggregate(run, number)
    assert run.state.sites["b"].quarantined
    assert run.state.sites["b"].live
    assert stage_of(run).cohort == ["a"]
    assert all("b" not in closed.contributions for closed in run.state.closed_rounds)


def test_a_site_that_fails_is_not_quarantined() -> None:
    run = started("ab", rounds=9)
    for number in (1, 2, 3, 4):
        update(run, "a")
        fail(run, "b")
        aggregate(run, number)
    assert stage_of(run).cohort == ["a", "b"]


def test_an_evicted_site_and_its_update_are_out_and_stay_out() -> None:
    run = started("abc", quorum="100%")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteEvicted(5.0, "a", "withdrew its consent"))) == [Discard(artifact(7))]
    assert work(update(run, "c")) == [Resolve("train/1")]
    assert set(stage_of(run).replies) == {"b", "c"}
    aggregate(run, 1)
    assert stage_of(run).cohort == ["b", "c"]
    assert run.state.sites["a"].state is SiteState.EVICTED
    assert run.handle(SiteSilent(7.0, "a")) == []


def test_eviction_of_the_last_site_that_works_closes_the_round() -> None:
    run = started("ab")
    update(run, "a")
    assert work(run.handle(SiteEvicted(5.0, "b", "broken"))) == [Resolve("train/1")]


def test_eviction_of_everybody_leaves_a_round_that_waits() -> None:
    run = started("ab")
    for site in "ab":
        run.handle(SiteEvicted(5.0, site, "broken"))
    assert doing(run) == "training"
    assert "waits for its quorum" in run.state.message
    # Nobody else has rows of the one selection: an operator can only stop such a run.
    run.handle(RunStopped(6.0, "no site is left"))
    assert run.state.phase is Phase.STOPPED


def test_an_eviction_while_the_strategy_works_keeps_the_site_out_of_training() -> None:
    run = enrolled()
    run.handle(SiteEvicted(3.0, "a", "broken"))
    select(run, "ab")
    assert set(run.state.tasks) == {"train/1/b"}


def test_an_eviction_while_updates_are_combined_changes_nothing_of_them() -> None:
    run = started("ab")
    for site in "ab":
        update(run, site)
    stage = stage_of(run).model_copy(deep=True)
    assert work(run.handle(SiteEvicted(5.0, "a", "broken"))) == []
    assert run.state.stage == stage
    aggregate(run, 1)
    assert run.state.closed_rounds[0].contributions == {"a": 5, "b": 5}
    assert stage_of(run).cohort == ["b"]


def test_stopping_ends_the_run_with_the_adapter_as_it_is() -> None:
    run = started(rounds=9)
    update(run, "a")
    update(run, "b")
    aggregate(run, 1)
    update(run, "a")
    assert work(run.handle(RunStopped(6.0, "good enough (alice)"))) == [Discard(artifact(7)), WriteCheckpoint()]
    assert run.state.phase is Phase.STOPPED
    assert run.state.phase.over
    assert (run.state.tasks, run.state.stage) == ({}, None)
    assert run.state.adapter == artifact(1)
    assert run.handle(RunStopped(7.0, "again")) == []
    # What was in work when it ended changes nothing.
    assert run.handle(StageResolved(8.0, "train/2", AdapterUpdated(artifact(2)))) == []


def test_a_pause_and_its_end_are_in_the_journal() -> None:
    run = started()
    said = [*run.handle(RunPaused("maintenance")), *run.handle(RunResumed("done")), *run.handle(RunResumed("twice"))]
    assert notes(said) == ["the run is paused: maintenance", "the run goes on: done"]


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


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    EVENTS,
    st.sampled_from(["1", "2", "4", "50%", "100%"]),
    st.sampled_from([0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5]),
)
def test_whatever_happens_a_round_has_its_quorum_or_all_of_it_failed(
    events: list[tuple[str, str]], quorum: str, fraction: float, over_selection: float
) -> None:
    run = started(
        "abcdef", rounds=50, quorum=quorum, cohort_fraction=fraction, over_selection=over_selection, deadline=1
    )
    for number, (kind, site) in enumerate(events):
        if run.state.phase.over:
            break
        before, needed = CohortProgress.of(run.state), run.state.artifacts
        at, task = float(number), f"train/{run.state.round_number}/{site}"
        match kind:
            case "update":
                instructions = update(run, site, 1000 + number)
            case "fail":
                instructions = run.handle(TaskFailed(at, task, "no memory"))
            case "reject":
                instructions = run.handle(ResultRejected(at, task, "not finite"))
            case "nothing":
                instructions = nothing(run, site)
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
                instructions = run.handle(DeadlineReached(at, stage_of(run).name))
            case "retry":
                instructions = run.handle(RetryDue(at, stage_of(run).name))
            case "aggregated":
                instructions = aggregate(run, number)
            case _:
                continue
        state = run.state
        # It can always be saved and read back.
        assert RunState.model_validate_json(state.model_dump_json()) == state
        # What the run needs no more is discarded, nothing else.
        discarded = {instruction.artifact for instruction in instructions if isinstance(instruction, Discard)}
        assert discarded == needed - state.artifacts
        if state.phase.over:
            break
        # Only live sites that the run still wants hold work that changes the adapter, or such as may come back.
        stage = stage_of(run)
        training = [task for task in state.tasks.values() if task.kind == "train"]
        assert all(not state.sites[task.site].excluded and task.site in stage.cohort for task in training)
        assert len({task.site for task in training}) == len(training)
        assert not {task.site for task in training} & set(stage.replies)
        if any(isinstance(instruction, Resolve) for instruction in instructions):
            assert before is not None
            assert doing(run) == "aggregating"
            answered = len(stage.replies)
            assert answered >= state.spec.rounds.quorum_of(stage.target) or (not answered and stage.failed)
        after = CohortProgress.of(state)
        if after is not None:
            # Nothing is left undone: it closes as soon as it can, and when it cannot, somebody works or is missing.
            assert not after.complete
            able = [name for name in state.coresets if state.sites[name].live and not state.sites[name].excluded]
            idle = set(able) - after.answered - after.failed - after.working
            assert after.working or not idle
