"""One stage after the other: steps of a selection, what replies add up to, what is remembered of them."""

from __future__ import annotations

from itertools import permutations

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.v2 import federation_pb2 as pb
from fedhds.v2.selection_pb2 import ClusterReport, ClusterStats, KMeansCenters, KMeansStats
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    DeadlineReached,
    Discard,
    Instruction,
    Resolve,
    ResultRejected,
    RetryDue,
    SiteEvicted,
    SiteHeard,
    SiteLeft,
    SiteSilent,
    TaskFailed,
    Wake,
)
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import Rejection, RunState, SiteState, unpacked
from fedhds_server.workflows import TASK_KINDS
from tests.support.machine import (
    aggregate,
    artifact,
    doing,
    enrolled,
    evaluation,
    fail,
    join,
    received,
    report,
    select,
    stage_of,
    started,
    step,
    update,
    work,
)

KMEANS = "federated-kmeans"


def stats(run: RunMachine, site: str, count: int = 10, total: int = 1) -> list[Instruction]:
    """The site reports one cluster."""
    cluster = ClusterStats(cluster_id=0, count=count, sums=[total])
    return report(run, site, KMeansStats(dimension=1, clusters=[cluster]))


def totals(run: RunMachine) -> tuple[int, int]:
    """Count and sum over the replies of the open stage."""
    (cluster,) = unpacked(stage_of(run).totals, KMeansStats).clusters
    return cluster.count, cluster.sums[0]


def in_step_2(sites: str = "abc", **settings: object) -> RunMachine:
    run = enrolled(sites, selection_strategy=KMEANS, **settings)
    for site in sites:
        stats(run, site)
    step(run, 0.5)
    return run


def request_of(run: RunMachine, site: str) -> KMeansCenters:
    """The centers that a site gets with its task."""
    task, centers = run.next_task(site), KMeansCenters()
    assert task is not None
    request = TASK_KINDS[task.kind].request(run.state, task)
    assert isinstance(request, Any)
    assert request.Unpack(centers)
    return centers


# What is remembered of a result.


def test_a_site_whose_answer_was_lost_is_known_by_the_task_that_was_accepted_last() -> None:
    run = started(rounds=1)
    join(run, "e", 0, evaluates=True)
    site = run.state.sites["a"]
    assert site.last_accepted == ""
    update(run, "a")
    assert site.last_accepted == "train/1/a"
    fail(run, "b")
    assert run.state.sites["b"].last_accepted == ""
    evaluation(run, 0, "e")
    assert run.state.sites["e"].last_accepted == "evaluate/0/e"
    # It outlives the round, and a restart of the coordinator.
    aggregate(run, 1)
    assert RunState.model_validate_json(run.state.model_dump_json()).sites["a"].last_accepted == "train/1/a"


def test_a_rejected_or_late_result_is_not_remembered_as_accepted() -> None:
    run = started("abc", quorum="1")
    run.handle(ResultRejected(4.0, "train/1/a", "not finite"))
    update(run, "b")
    run.handle(SiteSilent(5.0, "c"))
    assert doing(run) == "aggregating"
    assert update(run, "c") == []
    assert [run.state.sites[name].last_accepted for name in "abc"] == ["", "train/1/b", ""]
    rejected = [run.state.sites[name].last_rejected for name in "abc"]
    assert rejected == [Rejection(task_id="train/1/a", reason="not finite"), None, None]
    # It outlives the round, and a restart of the coordinator.
    aggregate(run, 1)
    assert RunState.model_validate_json(run.state.model_dump_json()).sites["a"].last_rejected == rejected[0]


def test_a_task_that_is_given_again_forgets_its_rejection() -> None:
    run = started("ab", quorum="2")
    run.handle(ResultRejected(4.0, "train/1/a", "not finite"))
    assert run.state.sites["a"].last_rejected is not None
    update(run, "b")
    run.handle(RetryDue(5.0, run.state.stage.name if run.state.stage else ""))
    assert "train/1/a" in run.state.tasks
    assert run.state.sites["a"].last_rejected is None


def test_a_task_that_is_given_again_forgets_the_result_that_it_had() -> None:
    run = in_step_2("ab")
    assert run.state.sites["a"].last_accepted == "select/0/a"
    for site in "ab":
        run.handle(SiteLeft(5.0, site))
    join(run, "c")
    join(run, "a")
    assert set(run.state.tasks) == {"select/0/c"}
    run.handle(SiteLeft(6.0, "c"))
    # Its report counted in the selection that was given up, not in this one.
    assert "select/0/a" in run.state.tasks
    assert run.state.sites["a"].last_accepted == ""


# Steps.


def test_sites_that_answered_get_the_next_step_with_its_request() -> None:
    run = enrolled("abc", selection_strategy=KMEANS)
    task = run.next_task("a")
    assert task is not None
    assert task.id == "select/0/a"
    assert TASK_KINDS["select"].request(run.state, task) is None
    stats(run, "a")
    stats(run, "b")
    assert work(run.handle(TaskFailed(3.0, "select/0/c", "no disk"))) == [Resolve("select/0")]
    assert doing(run) == "grouping"
    assert work(step(run, 0.25, 0.75)) == []
    stage = stage_of(run)
    assert (stage.step, stage.cohort, stage.target, stage.replies, stage.totals) == (1, ["a", "b"], 2, {}, "")
    assert set(run.state.tasks) == {f"{stage.name}/a", f"{stage.name}/b"}
    assert request_of(run, "a") == KMeansCenters(dimension=1, values=[0.25, 0.75])
    assert run.state.message == "selecting, step 2: 0 of 2 reports, waiting for a, b"
    # What a site answered to the step before does not count here.
    assert received(run, "select/0/a", KMeansStats(dimension=1)) == []
    assert stage_of(run).replies == {}
    stats(run, "a")
    assert work(stats(run, "b")) == [Resolve(stage.name)]
    select(run, "ab")
    assert set(run.state.tasks) == {"train/1/a", "train/1/b"}


def test_a_digest_of_the_request_is_part_of_a_steps_name() -> None:
    names = []
    for values in ((0.5,), (0.5,), (0.25,)):
        run = enrolled(selection_strategy=KMEANS)
        for site in "ab":
            stats(run, site)
        step(run, *values)
        names.append(stage_of(run).name)
    assert names[0] == names[1] != names[2]
    assert names[0].startswith("select/0.1-")
    assert len(names[0]) == len("select/0.1-") + 12


def test_steps_of_a_selection_per_round_have_the_rounds_number() -> None:
    run = enrolled(selection_strategy=KMEANS, selection_schedule="per-round")
    assert set(run.state.tasks) == {"select/1/a", "select/1/b"}
    for site in "ab":
        stats(run, site)
    step(run, 0.5)
    assert stage_of(run).name.startswith("select/1.1-")


def test_a_step_that_all_its_sites_have_left_starts_the_selection_again() -> None:
    run = in_step_2("ab")
    first = stage_of(run).name
    for site in "ab":
        run.handle(SiteSilent(5.0, site))
    # Nobody else is here to start with.
    assert stage_of(run).name == first
    assert run.state.message == ("selecting, step 2: waits for its quorum: 0 of at least 1 reports; disconnected: a, b")
    join(run, "c")
    assert (stage_of(run).name, stage_of(run).cohort) == ("select/0", ["c"])
    assert set(run.state.tasks) == {"select/0/c"}
    # A site that comes back to its old question is late.
    assert received(run, f"{first}/a", KMeansStats(dimension=1)) == []
    stats(run, "c")
    step(run, 0.75)
    assert stage_of(run).name != first
    assert received(run, f"{first}/c", KMeansStats(dimension=1)) == []
    assert stage_of(run).replies == {}


def test_a_step_to_which_a_site_answered_waits_and_does_not_start_again() -> None:
    run = in_step_2("ab", quorum="100%")
    stats(run, "a")
    run.handle(SiteLeft(5.0, "b"))
    join(run, "c")
    assert stage_of(run).cohort == ["a", "b"]
    assert run.state.message.endswith("waits for its quorum: 1 of at least 2 reports; disconnected: b")
    join(run, "b")
    assert request_of(run, "b") == KMeansCenters(dimension=1, values=[0.5])
    assert work(stats(run, "b")) == [Resolve(stage_of(run).name)]


def test_a_site_that_left_a_round_with_its_own_selection_and_comes_back_gets_its_task_again() -> None:
    run = started("ab", selection_schedule="per-round", quorum="100%")
    update(run, "a")
    run.handle(SiteLeft(5.0, "b"))
    join(run, "c")
    assert run.state.tasks == {}
    join(run, "b")
    assert set(run.state.tasks) == {"train/1/b"}
    assert work(update(run, "b")) == [Resolve("train/1")]


def test_three_rejected_reports_put_a_site_into_quarantine_and_the_selection_goes_on() -> None:
    run = enrolled("ab", selection_strategy=KMEANS, quorum="2")
    stats(run, "a")
    for number in (1, 2, 3):
        instructions = run.handle(ResultRejected(4.0, "select/0/b", "a cluster is reported twice"))
        assert run.state.sites["b"].rejections == number
        if number < 3:
            run.handle(RetryDue(9.0, "select/0"))
    assert run.state.sites["b"].quarantined
    assert stage_of(run).cohort == ["a"]
    assert not work(instructions)
    assert "1 of at least 2 reports" in run.state.message


# What replies add up to.


def test_reports_are_added_up_as_they_come_in_any_order() -> None:
    texts = set()
    for order in permutations("abc"):
        run = enrolled("abc", selection_strategy=KMEANS)
        for site in order:
            stats(run, site, 10, {"a": 1, "b": 20, "c": -300}[site])
        assert totals(run) == (30, -279)
        texts.add(stage_of(run).totals)
    assert len(texts) == 1
    # What is kept of a report itself has no sums.
    kept = unpacked(stage_of(run).replies["a"].message, KMeansStats)
    assert [(cluster.count, list(cluster.sums)) for cluster in kept.clusters] == [(10, [])]


def test_reports_that_are_not_added_up_are_kept_whole() -> None:
    run = enrolled(selection_strategy="fedhds-aligned")
    report(run, "a")
    assert stage_of(run).totals == ""
    assert stage_of(run).replies["a"].task_id == "select/0/a"


def test_what_an_evicted_site_has_added_to_the_totals_stays_for_this_step_only() -> None:
    run = enrolled("abc", selection_strategy=KMEANS)
    stats(run, "a", 10, 1)
    stats(run, "b", 10, 20)
    assert work(run.handle(SiteEvicted(5.0, "a", "withdrew its consent"))) == []
    assert totals(run) == (20, 21)
    assert (stage_of(run).cohort, stage_of(run).target) == (["b", "c"], 2)
    assert sorted(stage_of(run).replies) == ["a", "b"]
    progress = CohortProgress.of(run.state)
    assert progress is not None
    assert progress.answered == {"b"}
    assert work(stats(run, "c", 10, 300)) == [Resolve("select/0")]
    step(run, 0.5)
    assert (stage_of(run).cohort, stage_of(run).target) == (["b", "c"], 2)
    assert {task.site for task in run.state.tasks.values()} == {"b", "c"}
    for site in "bc":
        stats(run, site)
    assert totals(run) == (20, 2)


def test_an_evicted_sites_report_is_dropped_where_nothing_is_added_up() -> None:
    run = enrolled("abc", selection_strategy="fedhds-aligned")
    report(run, "a")
    report(run, "b")
    run.handle(SiteEvicted(5.0, "a", "withdrew its consent"))
    assert sorted(stage_of(run).replies) == ["b"]
    assert work(report(run, "c")) == [Resolve("select/0")]


def test_a_site_that_is_evicted_while_the_strategy_works_gets_no_further_step() -> None:
    run = enrolled("abc", selection_strategy=KMEANS)
    for site in "abc":
        stats(run, site)
    run.handle(SiteEvicted(5.0, "a", "broken"))
    step(run, 0.5)
    assert stage_of(run).cohort == ["b", "c"]
    assert {task.site for task in run.state.tasks.values()} == {"b", "c"}


def test_a_step_whose_sites_were_all_evicted_starts_again_with_others() -> None:
    run = enrolled("ab", selection_strategy=KMEANS)
    for site in "ab":
        stats(run, site)
    for site in "ab":
        run.handle(SiteEvicted(5.0, site, "broken"))
    assert doing(run) == "grouping"
    step(run, 0.5)
    assert (doing(run), run.state.tasks) == ("selecting", {})
    assert "waits for its quorum" in run.state.message
    join(run, "c")
    assert set(run.state.tasks) == {"select/0/c"}


@pytest.mark.parametrize("schedule", ["one-shot", "per-round"])
def test_a_selection_whose_sites_were_all_evicted_before_they_answered_asks_others(schedule: str) -> None:
    run = enrolled("ab", selection_strategy=KMEANS, selection_schedule=schedule)
    number = run.state.round_number
    for site in "ab":
        run.handle(SiteEvicted(5.0, site, "broken"))
    assert (doing(run), run.state.tasks) == ("selecting", {})
    assert Wake() in join(run, "c")
    assert (doing(run), set(run.state.tasks)) == ("selecting", {f"select/{number}/c"})
    assert work(stats(run, "c")) == [Resolve(f"select/{number}")]


@pytest.mark.parametrize(("strategy", "kind"), [("fedhds-aligned", ClusterReport), (KMEANS, KMeansStats)])
def test_nothing_that_no_strategy_knows_is_kept_of_a_report(strategy: str, kind: type[Message]) -> None:
    run = enrolled(selection_strategy=strategy)
    # The field 15 of 100,000 bytes.
    report(run, "a", kind.FromString(b"\x7a\xa0\x8d\x06" + bytes(100_000)))
    assert len(run.state.model_dump_json()) < 10_000


def test_of_the_result_of_training_only_rows_and_loss_are_kept() -> None:
    run = started("ab")
    result = pb.TrainResult.FromString(b"\x7a\xa0\x8d\x06" + bytes(100_000))
    result.MergeFrom(pb.TrainResult(update=artifact(7).to_proto(), samples=5, loss=1.0, train_s=3.0))
    received(run, "train/1/a", result, artifact(7))
    assert unpacked(stage_of(run).replies["a"].message, pb.TrainResult) == pb.TrainResult(samples=5, loss=1.0)


# Whatever happens.

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["answer", "answer", "fail", "reject", "silent", "heard", "leave", "join", "evict"]),
        st.sampled_from("abcd"),
    )
    | st.tuples(st.sampled_from(["deadline", "retry", "step", "end"]), st.just("")),
    max_size=50,
)


@pytest.mark.parametrize("schedule", ["one-shot", "per-round"])
@settings(max_examples=100, deadline=None)
@given(EVENTS, st.sampled_from(["1", "3", "50%", "100%"]), st.sampled_from([0.5, 1.0]))
def test_whatever_happens_a_stage_closes_waits_or_starts_again(
    schedule: str, events: list[tuple[str, str]], quorum: str, fraction: float
) -> None:
    run = enrolled(
        "abcd",
        rounds=50,
        selection_strategy=KMEANS,
        selection_schedule=schedule,
        quorum=quorum,
        cohort_fraction=fraction,
        deadline=1,
    )
    for number, (kind, site) in enumerate(events):
        at, stage, needed = float(number), stage_of(run), run.state.artifacts
        task_id, instructions = stage.task_id(site), []
        match kind:
            case "answer" if stage.kind == "train":
                instructions = update(run, site, 1000 + number)
            case "answer":
                instructions = stats(run, site)
            case "fail":
                instructions = run.handle(TaskFailed(at, task_id, "no memory"))
            case "reject":
                instructions = run.handle(ResultRejected(at, task_id, "not finite"))
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
                instructions = run.handle(DeadlineReached(at, stage.name))
            case "retry":
                instructions = run.handle(RetryDue(at, stage.name))
            case "step" if stage.kind == "select":
                instructions = step(run, number)
            case "end" if stage.kind == "select":
                instructions = select(run, "".join(stage.replies))
            case "end":
                instructions = aggregate(run, number)
        state = run.state
        assert RunState.model_validate_json(state.model_dump_json()) == state
        discarded = {instruction.artifact for instruction in instructions if isinstance(instruction, Discard)}
        assert discarded == needed - state.artifacts
        if state.phase.over:
            return
        stage = stage_of(run)
        # Every open task is one of the open stage, of a site that the run still wants.
        for task in state.tasks.values():
            assert (task.kind, task.id) == (stage.kind, stage.task_id(task.site))
            assert task.site in stage.cohort
            assert task.site not in stage.replies
            assert not state.sites[task.site].excluded
            assert state.sites[task.site].last_accepted != task.id
        assert not stage.closed or not state.tasks
        progress = CohortProgress.of(state)
        if progress is not None:
            assert not progress.complete
            # Who is here and can help is asked.
            able = set(state.trainers) - progress.answered - progress.failed
            if stage.kind == "train" and schedule == "one-shot":
                able &= set(state.coresets)
            if progress.short:
                assert not able & set(stage.cohort)
                assert not able or progress.answered or progress.failed
