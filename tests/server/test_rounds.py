"""The run's state machine, driven by lists of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import selection_pb2
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    Aggregate,
    DrawAdapter,
    EvaluationReceived,
    FinalDelivered,
    Instruction,
    Record,
    ReportReceived,
    RoundAggregated,
    Select,
    SelectionMade,
    SiteConnected,
    SiteHeard,
    SiteLeft,
    SiteRegistered,
    SiteSilent,
    TaskFailed,
    UpdateReceived,
    Wake,
    WriteCheckpoint,
)
from fedhds_server.run.quorum import cohort_size, draw
from fedhds_server.run.state import Evaluation, Phase, RunState, SiteState, TaskKind
from tests.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 4), "q.lora_B.weight": (4, 2)})
ALL_ROWS = selection_pb2.Coreset(all=selection_pb2.AllRows())


def artifact(number: int) -> Artifact:
    return Artifact(f"{number:064x}", 100)


def machine(*, needs_reports: bool = False, **fields: object) -> RunMachine:
    values = {"model": "m", "rounds": 2, "min_sites": 2, "evaluate_every": 0} | fields
    return RunMachine(RunState(run_id="r", spec=RunSpec.model_validate(values)), needs_reports=needs_reports)


def join(run: RunMachine, site: str, rows: int = 10, *, evaluates: bool = False) -> list[Instruction]:
    run.handle(SiteConnected(site, "", "s" + site))
    return run.handle(SiteRegistered(1.0, site, rows, evaluates, {"weights": "w"}, MANIFEST))


def started(sites: str = "ab", **fields: object) -> RunMachine:
    """A run whose `sites` have enrolled and whose selection gave each of them all rows."""
    fields["min_sites"] = len(sites)
    run = machine(**fields)  # type: ignore[arg-type]
    for site in sites:
        join(run, site)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    if run.state.phase is Phase.GROUPING:
        run.handle(SelectionMade(3.0, run.state.round, dict.fromkeys(run.state.reports, ALL_ROWS)))
    return run


def update(run: RunMachine, site: str, number: int = 7, samples: int = 5) -> list[Instruction]:
    return run.handle(UpdateReceived(4.0, f"train/{run.state.round}/{site}", artifact(number), samples, 1.0))


def phase(run: RunMachine) -> Phase:
    """Read through a function, or mypy would take it for unchanging."""
    return run.state.phase


def work(instructions: list[Instruction]) -> list[Instruction]:
    return [instruction for instruction in instructions if not isinstance(instruction, (Record, Wake))]


def test_waits_for_enough_sites_then_selects() -> None:
    run = machine()
    assert work(join(run, "a")) == [DrawAdapter()]
    assert run.state.message == "waiting for 1 more site"
    assert work(run.handle(AdapterDrawn(2.0, artifact(0)))) == []
    assert work(join(run, "b")) == [WriteCheckpoint(), Select(0, ("a", "b"))]
    assert phase(run) is Phase.GROUPING


def test_waits_for_evaluators_when_told_to() -> None:
    run = started(min_evaluators=1)
    assert phase(run) is Phase.ENROLLING
    assert run.state.message == "waiting for 1 more evaluator"
    join(run, "e", 0, evaluates=True)
    assert phase(run) is Phase.GROUPING


def test_a_whole_run() -> None:
    run = started()
    assert {task.id for task in run.state.tasks.values()} == {"train/1/a", "train/1/b"}
    assert work(update(run, "a")) == []
    assert work(update(run, "b")) == [Aggregate(1)]
    assert phase(run) is Phase.AGGREGATING
    assert work(run.handle(RoundAggregated(5.0, artifact(1)))) == [WriteCheckpoint()]
    assert run.state.round == 2
    update(run, "a")
    update(run, "b")
    assert work(run.handle(RoundAggregated(6.0, artifact(2)))) == [WriteCheckpoint(), WriteCheckpoint()]
    assert phase(run) is Phase.COMPLETED
    assert [closed.samples for closed in run.state.closed_rounds] == [10, 10]
    run.handle(FinalDelivered("a"))
    assert [site.delivered for site in run.state.sites.values()] == [True, False]


def test_reports_are_asked_of_all_sites_when_the_strategy_needs_them() -> None:
    run = machine(needs_reports=True)
    join(run, "a")
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert {task.id for task in run.state.tasks.values()} == {"select/0/a", "select/0/b"}
    assert work(run.handle(ReportReceived(3.0, "select/0/a", selection_pb2.ClusterReport()))) == []
    assert work(run.handle(TaskFailed(3.0, "select/0/b", "no disk"))) == [Select(0, ("a",))]
    run.handle(SelectionMade(4.0, 0, {"a": ALL_ROWS}))
    assert set(run.state.tasks) == {"train/1/a"}


def test_a_lost_site_does_not_hold_the_round_and_its_late_update_changes_nothing() -> None:
    run = started("abc")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteSilent(9.0, "c"))) == [Aggregate(1)]
    assert run.next_task("c") is None
    assert update(run, "c") == []
    run.handle(RoundAggregated(10.0, artifact(1)))
    assert run.state.closed_rounds[0].contributions == {"a": 5, "b": 5}


def test_a_lost_site_that_returns_in_time_still_counts() -> None:
    run = started("abc")
    run.handle(SiteSilent(8.0, "c"))
    update(run, "a")
    run.handle(SiteHeard(9.0, "c"))
    update(run, "b")
    assert phase(run) is Phase.TRAINING
    assert work(update(run, "c")) == [Aggregate(1)]


def test_a_round_whose_sites_are_all_lost_waits_for_them() -> None:
    run = started()
    assert work([*run.handle(SiteSilent(8.0, "a")), *run.handle(SiteSilent(8.0, "b"))]) == []
    assert run.state.message == "round 1 of 2: waits for its quorum: 0 of at least 1 updates; away: a, b"
    run.handle(SiteHeard(9.0, "a"))
    assert work(update(run, "a")) == [Aggregate(1)]


def test_another_site_takes_over_a_round_whose_cohort_is_lost() -> None:
    run = started("ab", cohort_fraction=0.5)
    (drawn,) = run.state.cohort
    other = "b" if drawn == "a" else "a"
    run.handle(SiteSilent(8.0, drawn))
    assert run.state.cohort == ["a", "b"]
    assert run.next_task(other) is not None
    assert work(update(run, other)) == [Aggregate(1)]
    assert run.state.tasks == {}


def test_a_site_that_comes_takes_over_a_round_whose_cohort_is_lost() -> None:
    run = started("ab", schedule="per-round")
    for site in "ab":
        run.handle(SiteSilent(8.0, site))
    assert work(join(run, "c")) == [Select(1, ("c",))]
    run.handle(SelectionMade(9.0, 1, {"c": ALL_ROWS}))
    assert set(run.state.tasks) == {"train/1/c"}


def test_another_site_takes_over_a_selection_whose_sites_are_lost() -> None:
    run = machine(needs_reports=True)
    join(run, "a")
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    for site in "ab":
        run.handle(SiteSilent(3.0, site))
    assert set(run.state.tasks) == {"select/0/a", "select/0/b"}
    join(run, "c")
    assert set(run.state.tasks) == {"select/0/a", "select/0/b", "select/0/c"}
    assert work(run.handle(ReportReceived(4.0, "select/0/c", selection_pb2.ClusterReport()))) == [Select(0, ("c",))]


def test_a_restart_while_all_sites_of_a_selection_are_lost_waits_for_them_too() -> None:
    run = machine(needs_reports=True)
    join(run, "a")
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    for site in "ab":
        run.handle(SiteSilent(3.0, site))
    assert run.pending() == [WriteCheckpoint()]
    run.handle(SiteHeard(4.0, "a"))
    assert work(run.handle(ReportReceived(5.0, "select/0/a", selection_pb2.ClusterReport()))) == [Select(0, ("a",))]


def test_a_run_in_which_nobody_delivered_fails_however_short_it_was() -> None:
    run = started(rounds=1)
    for site in "ab":
        run.handle(TaskFailed(4.0, f"train/1/{site}", "no memory"))
    run.handle(RoundAggregated(5.0, artifact(0)))
    assert phase(run) is Phase.FAILED
    assert "untrained" in run.state.message


def test_a_round_in_which_all_who_are_here_failed_waits_for_the_others() -> None:
    run = started()
    run.handle(SiteSilent(4.0, "b"))
    assert work(run.handle(TaskFailed(4.0, "train/1/a", "no memory"))) == []
    run.handle(SiteHeard(5.0, "b"))
    assert work(run.handle(TaskFailed(6.0, "train/1/b", "no memory"))) == [Aggregate(1)]


def test_a_round_without_any_eligible_site_waits_and_opens_when_one_returns() -> None:
    run = started(rounds=3)
    update(run, "a")
    update(run, "b")
    run.handle(SiteSilent(5.0, "a"))
    run.handle(SiteSilent(5.0, "b"))
    run.handle(RoundAggregated(6.0, artifact(1)))
    assert (run.state.round, run.state.tasks) == (2, {})
    # Nothing else that happens meanwhile may close the round.
    join(run, "e", 0, evaluates=True)
    run.handle(EvaluationReceived(7.0, "evaluate/0/e", Evaluation(rows=1, tokens=1, loss_sum=1, rouge_l_sum=0)))
    assert phase(run) is Phase.TRAINING
    run.handle(SiteHeard(8.0, "b"))
    assert set(run.state.tasks) == {"train/2/b"}


def test_a_round_whose_tasks_all_failed_leaves_the_adapter_and_three_of_them_end_the_run() -> None:
    run = started(rounds=9)
    for number in (1, 2, 3):
        for site in "ab":
            instructions = run.handle(TaskFailed(4.0, f"train/{number}/{site}", "no memory"))
        assert work(instructions) == [Aggregate(number)]
        assert run.state.updates == {}
        run.handle(RoundAggregated(5.0, artifact(0)))
    assert phase(run) is Phase.FAILED
    assert run.state.message == "no site delivered an update in 3 rounds running"


def test_a_one_shot_selection_of_nothing_fails_with_the_reason() -> None:
    run = machine()
    join(run, "a")
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    run.handle(SelectionMade(3.0, 0, {}))
    assert phase(run) is Phase.FAILED
    assert run.state.message == "the selection chose no row of any site; give it a --budget"


def test_per_round_selection_of_nothing_is_a_round_that_changes_nothing() -> None:
    run = started(schedule="per-round", rounds=5)
    update(run, "a")
    update(run, "b")
    run.handle(RoundAggregated(5.0, artifact(1)))
    for number in (2, 3, 4, 5):
        assert phase(run) is Phase.GROUPING
        assert work(run.handle(SelectionMade(6.0, number, {}))) == [Aggregate(number)]
        run.handle(RoundAggregated(7.0, artifact(1)))
    assert phase(run) is Phase.COMPLETED
    assert [len(closed.contributions) for closed in run.state.closed_rounds] == [2, 0, 0, 0, 0]


def test_a_selection_of_an_earlier_round_is_ignored() -> None:
    run = started(schedule="per-round", rounds=5)
    assert run.state.round == 1
    assert run.handle(SelectionMade(6.0, 0, {"a": ALL_ROWS})) == []


def test_evaluators_get_every_due_round_also_when_they_come_late() -> None:
    run = started(rounds=4, evaluate_every=2)
    for number in (1, 2):
        update(run, "a")
        update(run, "b")
        run.handle(RoundAggregated(5.0, artifact(number)))
    join(run, "e", 0, evaluates=True)
    assert [task.round for task in run.state.tasks.values() if task.kind is TaskKind.EVALUATE] == [0, 2]
    assert set(run.state.adapters) == {0, 2}


def test_the_end_waits_for_live_evaluators_only() -> None:
    run = machine(min_evaluators=2, rounds=1, min_sites=1)
    join(run, "a")
    for site in "ef":
        join(run, site, 0, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    run.handle(SelectionMade(3.0, 0, {"a": ALL_ROWS}))
    update(run, "a")
    run.handle(RoundAggregated(5.0, artifact(1)))
    assert phase(run) is Phase.FINISHING
    sums = Evaluation(rows=2, tokens=4, loss_sum=8, rouge_l_sum=1)
    for number in (0, 1):
        run.handle(EvaluationReceived(6.0, f"evaluate/{number}/e", sums))
    assert phase(run) is Phase.FINISHING
    run.handle(SiteSilent(7.0, "f"))
    assert phase(run) is Phase.COMPLETED


def test_a_site_that_trains_and_evaluates_trains_first() -> None:
    run = machine(min_sites=1)
    join(run, "a", 5, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    run.handle(SelectionMade(3.0, 0, {"a": ALL_ROWS}))
    task = run.next_task("a")
    assert task is not None
    assert task.kind is TaskKind.TRAIN


def test_leaving_gives_up_the_task_at_once() -> None:
    run = started("abc")
    update(run, "a")
    update(run, "b")
    assert work(run.handle(SiteLeft(5.0, "c"))) == [Aggregate(1)]
    assert run.state.sites["c"].state is SiteState.LEFT


def test_a_site_that_comes_after_a_one_shot_selection_is_told_apart() -> None:
    run = started()
    notes = [i.message for i in join(run, "late") if isinstance(i, Record)]
    assert any("came after the selection" in note for note in notes)


@pytest.mark.parametrize("events", [0, 1, 2, 3, 4, 5])
def test_state_survives_its_serialization_at_every_step(events: int) -> None:
    run = started()
    steps = [
        lambda: update(run, "a"),
        lambda: update(run, "b"),
        lambda: run.handle(RoundAggregated(5.0, artifact(1))),
        lambda: update(run, "a"),
        lambda: update(run, "b"),
    ]
    for step in steps[:events]:
        step()
    again = RunState.model_validate_json(run.state.model_dump_json())
    assert again == run.state


def test_pending_work_after_a_restart() -> None:
    run = machine(needs_reports=True)
    assert run.pending() == []
    join(run, "a")
    assert run.pending() == [DrawAdapter()]
    join(run, "b")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert run.pending() == [WriteCheckpoint()]
    for site in "ab":
        run.handle(ReportReceived(3.0, f"select/0/{site}", selection_pb2.ClusterReport()))
    assert run.pending() == [Select(0, ("a", "b"))]
    run.handle(SelectionMade(4.0, 0, {"a": ALL_ROWS}))
    assert run.pending() == [WriteCheckpoint()]
    update(run, "a")
    assert run.pending() == [Aggregate(1)]


@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=30), st.floats(0.01, 1), st.integers(1, 9))
def test_cohorts_have_the_asked_size_whatever_the_order(sites: set[str], fraction: float, number: int) -> None:
    ordered = sorted(sites)
    size = cohort_size(len(sites), fraction)
    cohort = draw(ordered, size, seed=1, round_number=number)
    assert cohort == draw(ordered[::-1], size, seed=1, round_number=number)
    assert len(cohort) == size
    assert 1 <= len(cohort) <= len(sites)
    assert abs(len(cohort) - fraction * len(sites)) <= 0.5 or len(cohort) == 1
    assert set(cohort) <= sites
