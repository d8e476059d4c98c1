"""The run's state machine, driven by lists of events: when a run starts, what follows which round, how it ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.spec import RoundsSpec
from fedhds.v2.selection_pb2 import KMeansStats
from fedhds_server.run.activity import activities
from fedhds_server.run.events import (
    AdapterDrawn,
    AdapterUpdated,
    CoresetsSelected,
    Discard,
    DrawAdapter,
    FinalDelivered,
    Record,
    Resolve,
    SiteConnected,
    SiteHeard,
    SiteLeft,
    SiteSilent,
    StageResolved,
    TaskFailed,
    WriteCheckpoint,
)
from fedhds_server.run.quorum import draw
from fedhds_server.run.state import Phase, RunState, SiteState
from tests.support.machine import (
    ALL_ROWS,
    aggregate,
    artifact,
    doing,
    enrolled,
    evaluation,
    fail,
    join,
    machine,
    notes,
    report,
    resolve,
    select,
    stage_of,
    started,
    step,
    update,
    validation,
    work,
)


def test_waits_for_enough_sites_then_selects() -> None:
    run = machine()
    assert work(join(run, "a")) == [DrawAdapter()]
    assert run.state.message == "waiting for 1 more site"
    assert work(run.handle(AdapterDrawn(2.0, artifact(0)))) == []
    assert work(join(run, "b")) == [WriteCheckpoint(), Resolve("select/0")]
    assert sorted(stage_of(run).replies) == ["a", "b"]
    assert doing(run) == "grouping"


def test_waits_for_evaluators_when_told_to() -> None:
    run = started(min_evaluators=1)
    assert run.state.phase is Phase.ENROLLING
    assert run.state.message == "waiting for 1 more evaluator"
    join(run, "e", 0, evaluates=True)
    assert doing(run) == "grouping"


def test_a_whole_run() -> None:
    run = started()
    assert {task.id for task in run.state.tasks.values()} == {"train/1/a", "train/1/b"}
    assert work(update(run, "a", 7)) == []
    assert work(update(run, "b", 8)) == [Resolve("train/1")]
    assert doing(run) == "aggregating"
    # What was combined is needed no more.
    assert work(aggregate(run, 1)) == [WriteCheckpoint(), Discard(artifact(7)), Discard(artifact(8))]
    assert run.state.round_number == 2
    update(run, "a", 7)
    update(run, "b", 8)
    ended = work(aggregate(run, 2))
    # Nor is the adapter between the first and the last one.
    assert ended == [
        WriteCheckpoint(),
        Discard(artifact(1)),
        WriteCheckpoint(),
        Discard(artifact(7)),
        Discard(artifact(8)),
    ]
    assert run.state.phase is Phase.COMPLETED
    assert [closed.samples for closed in run.state.closed_rounds] == [10, 10]
    assert run.state.artifacts == {artifact(0), artifact(2)}
    run.handle(FinalDelivered("a"))
    assert [site.delivered for site in run.state.sites.values()] == [True, False]


def test_all_activities_are_known() -> None:
    run = machine(min_sites=1, min_evaluators=1, rounds=1, selection_strategy="fedhds-aligned")
    seen = [doing(run)]
    join(run, "a")
    join(run, "e", 0, evaluates=True, validation_rows=3)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    for move in (
        lambda: report(run, "a"),
        lambda: select(run, "a"),
        lambda: update(run, "a"),
        lambda: aggregate(run, 1),
        lambda: [validation(run, number, "e", 1.0) for number in (0, 1)],
        lambda: [evaluation(run, number, "e") for number in (0, 1)],
    ):
        seen.append(doing(run))
        move()
    seen.append(doing(run))
    stages = ["enrolling", "selecting", "grouping", "training", "aggregating", "validating", "finishing", "completed"]
    assert seen == stages
    assert set(activities()) == {*seen, "stopped", "failed"}
    assert len(activities()) == 10


def test_reports_are_asked_of_all_sites_when_the_strategy_needs_them() -> None:
    run = enrolled(selection_strategy="fedhds-aligned")
    assert {task.id for task in run.state.tasks.values()} == {"select/0/a", "select/0/b"}
    assert work(report(run, "a")) == []
    assert work(run.handle(TaskFailed(3.0, "select/0/b", "no disk"))) == [Resolve("select/0")]
    assert sorted(stage_of(run).replies) == ["a"]
    select(run, "a")
    assert set(run.state.tasks) == {"train/1/a"}


def test_a_lost_site_does_not_hold_the_round_and_its_late_update_changes_nothing() -> None:
    run = started("abc")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteSilent(9.0, "c"))) == [Resolve("train/1")]
    assert run.next_task("c") is None
    assert update(run, "c") == []
    aggregate(run, 1)
    assert run.state.closed_rounds[0].contributions == {"a": 5, "b": 5}


def test_a_lost_site_that_returns_in_time_still_counts() -> None:
    run = started("abc")
    run.handle(SiteSilent(8.0, "c"))
    update(run, "a")
    run.handle(SiteHeard(9.0, "c"))
    update(run, "b")
    assert doing(run) == "training"
    assert work(update(run, "c")) == [Resolve("train/1")]


def test_a_round_whose_sites_are_all_lost_waits_for_them() -> None:
    run = started()
    assert work([*run.handle(SiteSilent(8.0, "a")), *run.handle(SiteSilent(8.0, "b"))]) == []
    assert run.state.message == "round 1 of 2: waits for its quorum: 0 of at least 1 updates; disconnected: a, b"
    run.handle(SiteHeard(9.0, "a"))
    assert work(update(run, "a")) == [Resolve("train/1")]


def test_another_site_takes_over_a_round_whose_cohort_is_lost() -> None:
    run = started("ab", cohort_fraction=0.5)
    (drawn,) = stage_of(run).cohort
    other = "b" if drawn == "a" else "a"
    run.handle(SiteSilent(8.0, drawn))
    assert stage_of(run).cohort == ["a", "b"]
    assert run.next_task(other) is not None
    assert work(update(run, other)) == [Resolve("train/1")]
    assert run.state.tasks == {}


def test_a_site_that_comes_takes_over_a_round_whose_cohort_is_lost() -> None:
    run = started("ab", selection_schedule="per-round")
    for site in "ab":
        run.handle(SiteSilent(8.0, site))
    assert work(join(run, "c")) == [Resolve("select/1")]
    assert sorted(stage_of(run).replies) == ["c"]
    select(run, "c")
    assert set(run.state.tasks) == {"train/1/c"}


def test_another_site_takes_over_a_selection_whose_sites_are_lost() -> None:
    run = enrolled(selection_strategy="fedhds-aligned")
    for site in "ab":
        run.handle(SiteSilent(3.0, site))
    assert set(run.state.tasks) == {"select/0/a", "select/0/b"}
    join(run, "c")
    assert set(run.state.tasks) == {"select/0/a", "select/0/b", "select/0/c"}
    assert work(report(run, "c")) == [Resolve("select/0")]
    assert sorted(stage_of(run).replies) == ["c"]


def test_a_restart_while_all_sites_of_a_selection_are_lost_waits_for_them_too() -> None:
    run = enrolled(selection_strategy="fedhds-aligned")
    for site in "ab":
        run.handle(SiteSilent(3.0, site))
    assert run.pending() == [WriteCheckpoint()]
    run.handle(SiteHeard(4.0, "a"))
    assert work(report(run, "a")) == [Resolve("select/0")]
    assert sorted(stage_of(run).replies) == ["a"]


def test_a_run_in_which_nobody_delivered_fails_however_short_it_was() -> None:
    run = started(rounds=1)
    for site in "ab":
        fail(run, site)
    aggregate(run, 0)
    assert run.state.phase is Phase.FAILED
    assert "untrained" in run.state.message


def test_a_round_in_which_all_who_are_here_failed_waits_for_the_others() -> None:
    run = started()
    run.handle(SiteSilent(4.0, "b"))
    assert work(fail(run, "a")) == []
    run.handle(SiteHeard(5.0, "b"))
    assert work(fail(run, "b")) == [Resolve("train/1")]


def test_a_round_without_any_eligible_site_waits_and_opens_when_one_returns() -> None:
    run = started(rounds=3)
    update(run, "a")
    update(run, "b")
    run.handle(SiteSilent(5.0, "a"))
    run.handle(SiteSilent(5.0, "b"))
    aggregate(run, 1)
    assert (run.state.round_number, run.state.tasks) == (2, {})
    # Nothing else that happens meanwhile may close the round.
    join(run, "e", 0, evaluates=True)
    assert notes(evaluation(run, 0, "e"))
    assert doing(run) == "training"
    run.handle(SiteHeard(8.0, "b"))
    assert set(run.state.tasks) == {"train/2/b"}


def test_a_round_whose_tasks_all_failed_leaves_the_adapter_and_three_of_them_end_the_run() -> None:
    run = started(rounds=9)
    for number in (1, 2, 3):
        for site in "ab":
            instructions = fail(run, site)
        assert work(instructions) == [Resolve(f"train/{number}")]
        assert stage_of(run).replies == {}
        assert Discard(artifact(0)) not in aggregate(run, 0)
    assert run.state.phase is Phase.FAILED
    assert run.state.message == (
        "no site delivered an update in 3 rounds in a row; last failures: sites a, b: no memory"
    )


@pytest.mark.parametrize("schedule", ["one-shot", "per-round"])
def test_a_selection_whose_every_task_failed_says_so_and_asks_for_no_budget(schedule: str) -> None:
    run = enrolled("abc", selection_strategy="fedhds-aligned", selection_schedule=schedule, rounds=9)
    for _ in range(1 if schedule == "one-shot" else 3):
        for site, reason in {"a": "TaskError: no memory", "b": "TaskError: no memory", "c": "OSError"}.items():
            run.handle(TaskFailed(4.0, stage_of(run).task_id(site), reason))
        select(run, "")
        if schedule == "per-round":
            aggregate(run, 0)
    assert run.state.phase is Phase.FAILED
    said = "no site could select" if schedule == "one-shot" else "no site delivered an update in 3 rounds in a row"
    assert run.state.message == f"{said}; last failures: sites a, b: TaskError: no memory; site c: OSError"


def test_a_run_says_why_sites_that_it_waits_for_have_left() -> None:
    run = machine()
    run.handle(SiteConnected("a", "", "sa"))
    instructions = run.handle(SiteLeft(3.0, "a", "ModelError: no such module"))
    assert notes(instructions) == ["site a left: ModelError: no such module"]
    assert run.state.message == "waiting for 2 more sites; last failures: site a: ModelError: no such module"
    join(run, "a")
    assert run.state.message == "waiting for 1 more site"


def test_a_one_shot_selection_of_nothing_fails_with_the_reason() -> None:
    run = enrolled()
    select(run, "")
    assert run.state.phase is Phase.FAILED
    assert run.state.message == "the selection chose no row of any site; give it a --selection-budget"


def test_per_round_selection_of_nothing_is_a_round_that_changes_nothing() -> None:
    run = started(selection_schedule="per-round", rounds=5)
    update(run, "a")
    update(run, "b")
    aggregate(run, 1)
    for number in (2, 3, 4, 5):
        assert doing(run) == "grouping"
        assert work(select(run, "")) == [Resolve(f"train/{number}")]
        aggregate(run, 1)
    assert run.state.phase is Phase.COMPLETED
    assert [len(closed.contributions) for closed in run.state.closed_rounds] == [2, 0, 0, 0, 0]


def test_what_came_of_an_earlier_stage_is_ignored() -> None:
    run = started(selection_schedule="per-round", rounds=5)
    assert run.state.round_number == 1
    before = run.state.model_copy(deep=True)
    for stage in ("select/0", "select/1", "train/0"):
        assert run.handle(StageResolved(6.0, stage, CoresetsSelected({"a": ALL_ROWS}))) == []
    # Nor can an open stage be resolved.
    assert run.handle(StageResolved(6.0, "train/1", AdapterUpdated(artifact(1)))) == []
    assert run.state == before


def test_evaluators_get_every_due_round_also_when_they_come_late() -> None:
    run = started(rounds=4, evaluate_every=2)
    for number in (1, 2):
        update(run, "a")
        update(run, "b")
        aggregate(run, number)
    join(run, "e", 0, evaluates=True)
    assert [task.round_number for task in run.state.tasks.values() if task.kind == "evaluate"] == [0, 2]
    # A rollback leads to the adapter before the newest.
    assert set(run.state.adapters) == {0, 1, 2}


def test_adapters_that_no_evaluator_will_need_are_discarded() -> None:
    run = started(rounds=4, evaluate_every=2)
    dropped = []
    for number in (1, 2, 3):
        update(run, "a")
        update(run, "b")
        dropped.append([item.artifact for item in aggregate(run, number) if isinstance(item, Discard)])
    # A rollback leads to the adapter before the newest.
    assert dropped == [[artifact(7)], [artifact(7)], [artifact(1), artifact(7)]]
    assert set(run.state.adapters) == {0, 2, 3}


def test_an_optimizers_slots_are_kept_with_the_adapter_that_a_rollback_leads_to_and_then_discarded() -> None:
    run = started(rounds=9)
    for number, slot in ((1, 51), (2, 52), (3, 53)):
        update(run, "a")
        update(run, "b")
        discards = resolve(run, AdapterUpdated(artifact(number), {"velocity": artifact(slot)}))
        assert (Discard(artifact(51)) in discards) == (number == 3)
        assert artifact(slot) in run.state.artifacts
    assert run.state.slots == {"velocity": artifact(53)}
    assert run.state.slots_at == {2: {"velocity": artifact(52)}}


def test_an_upload_whose_bytes_are_the_new_adapters_is_kept() -> None:
    run = started()
    update(run, "a", 1)
    update(run, "b", 8)
    assert work(aggregate(run, 1)) == [WriteCheckpoint(), Discard(artifact(8))]


@pytest.mark.parametrize(("losses", "mean"), [((2.0, None), 2.0), ((None, 0.5), 0.5), ((None, None), None)])
def test_sites_that_keep_their_loss_to_themselves_count_all_the_same(
    losses: tuple[float | None, float | None], mean: float | None
) -> None:
    run = started()
    update(run, "a", 7, samples=1, loss=losses[0])
    update(run, "b", 8, samples=3, loss=losses[1])
    instructions = aggregate(run, 1)
    (closed,) = run.state.closed_rounds
    assert (closed.contributions, closed.loss) == ({"a": 1, "b": 3}, mean)
    said = f", training loss {mean:.4f}" if mean else ""
    assert f"round 1 closed with 2 updates over 4 samples{said}" in notes(instructions)
    assert RunState.model_validate_json(run.state.model_dump_json()) == run.state


def test_a_damaged_update_does_not_count_and_is_discarded() -> None:
    run = started()
    update(run, "a", 7, samples=5)
    update(run, "b", 8, samples=3)
    damaged = {"b": "its bytes have changed"}
    instructions = resolve(run, AdapterUpdated(artifact(1), damaged=damaged))
    assert instructions[0] == Record("round 1 goes on without the update of site b: its bytes have changed", True)
    assert "round 1 closed with 1 updates over 5 samples, training loss 1.0000" in notes(instructions)
    assert {Discard(artifact(7)), Discard(artifact(8))} <= set(work(instructions))
    (closed,) = run.state.closed_rounds
    assert (closed.cohort, closed.contributions, closed.samples) == (["a", "b"], {"a": 5}, 5)


def test_rounds_whose_updates_are_all_damaged_are_failed_rounds() -> None:
    run = started(rounds=9)
    for _ in range(3):
        for site in "ab":
            update(run, site)
        resolve(run, AdapterUpdated(artifact(0), damaged=dict.fromkeys("ab", "torn")))
    assert run.state.phase is Phase.FAILED


def test_the_end_waits_for_live_evaluators_only() -> None:
    run = machine(min_evaluators=2, rounds=1, min_sites=1)
    join(run, "a")
    for site in "ef":
        join(run, site, 0, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    select(run, "a")
    update(run, "a")
    aggregate(run, 1)
    assert doing(run) == "finishing"
    for number in (0, 1):
        evaluation(run, number, "e")
    assert doing(run) == "finishing"
    run.handle(SiteSilent(7.0, "f"))
    assert run.state.phase is Phase.COMPLETED


def test_an_evaluation_is_in_the_journal() -> None:
    run = started(rounds=1)
    join(run, "e", 0, evaluates=True)
    update(run, "a")
    update(run, "b")
    aggregate(run, 1)
    told = [notes(evaluation(run, number, "e"))[0] for number in (0, 1)]
    assert told == [
        f"{when}, e measures loss 2.0000, rouge_l 0.5000 on 2 rows"
        for when in ("before the first round", "after round 1")
    ]


def test_a_site_that_trains_and_evaluates_trains_first() -> None:
    run = machine(min_sites=1)
    join(run, "a", 5, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    select(run, "a")
    task = run.next_task("a")
    assert task is not None
    assert task.kind == "train"


def test_leaving_gives_up_the_task_at_once() -> None:
    run = started("abc")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteLeft(5.0, "c"))) == [Resolve("train/1")]
    assert run.state.sites["c"].state is SiteState.LEFT


def test_a_site_that_comes_after_a_one_shot_selection_is_told_apart() -> None:
    run = started()
    assert any("came after the selection" in note for note in notes(join(run, "late")))


@pytest.mark.parametrize("events", [0, 1, 2, 3, 4, 5])
def test_state_survives_its_serialization_at_every_step(events: int) -> None:
    run = started()
    steps = [
        lambda: update(run, "a"),
        lambda: update(run, "b"),
        lambda: aggregate(run, 1),
        lambda: update(run, "a"),
        lambda: update(run, "b"),
    ]
    for move in steps[:events]:
        move()
    again = RunState.model_validate_json(run.state.model_dump_json())
    assert again == run.state


def test_pending_work_after_a_restart() -> None:
    run = machine(selection_strategy="federated-kmeans")
    assert run.pending() == []
    join(run, "a")
    assert run.pending() == [DrawAdapter()]
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert run.pending() == [WriteCheckpoint()]
    for site in "ab":
        report(run, site, KMeansStats(dimension=1))
    assert run.pending() == [Resolve("select/0")]
    step(run, 0.5)
    assert run.pending() == [WriteCheckpoint()]
    for site in "ab":
        report(run, site, KMeansStats(dimension=1))
    assert run.pending() == [Resolve(stage_of(run).name)]
    select(run, "a")
    assert run.pending() == [WriteCheckpoint()]
    update(run, "a")
    assert run.pending() == [Resolve("train/1")]


# A name with a slash is one shard of a party's, see test_parties.py.
@given(
    st.sets(
        st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=8), min_size=1, max_size=30
    ),
    st.floats(0.01, 1),
    st.integers(1, 9),
)
def test_cohorts_have_the_asked_size_whatever_the_order(sites: set[str], fraction: float, number: int) -> None:
    ordered = sorted(sites)
    size = RoundsSpec(count=1, cohort_fraction=fraction).cohort_of(len(sites))
    cohort = draw(ordered, size, seed=1, round_number=number)
    assert cohort == draw(ordered[::-1], size, seed=1, round_number=number)
    assert len(cohort) == size
    assert 1 <= len(cohort) <= len(sites)
    assert abs(len(cohort) - fraction * len(sites)) <= 0.5 or len(cohort) == 1
    assert set(cohort) <= sites
