"""What sites hear of a run: where it stands and their own part, nothing of each other."""

from __future__ import annotations

from itertools import permutations

import pytest

from fedhds.errors import EnrollmentRefused
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import AdapterDrawn, TaskFailed
from fedhds_server.run.membership import admit
from fedhds_server.run.messages import for_site
from fedhds_server.run.state import Evaluation, MetricSum, Phase
from fedhds_server.status import means_of, site_status_of
from tests.support.machine import aggregate, artifact, enrolled, fail, join, machine, received, select, started, update


def named(run: RunMachine, *names: str) -> bool:
    """Whether what `kim` hears, or sees, names another site or its errors."""
    heard = for_site(run.state, "kim")
    seen = site_status_of(run.state, "kim")
    assert seen.message == heard
    assert {site.site for site in seen.sites} == ({"kim"} & set(run.state.sites))
    assert not seen.journal
    assert not seen.checkpoint
    texts = (heard, str(seen).replace("training", ""))
    return any(name in text for name in names for text in texts)


def test_no_site_hears_of_another_in_the_course_of_a_run() -> None:
    run = machine(min_sites=3, selection_strategy="fedhds-aligned")
    join(run, "kim")
    join(run, "secret-hospital")
    run.state.sites["secret-hospital"].last_error = "DiskError: no room"
    assert for_site(run.state, "kim") == "waiting for 1 more site"
    assert not named(run, "secret", "room")
    join(run, "lee")
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert for_site(run.state, "kim") == "selecting: 0 of 3 reports"
    assert "secret-hospital" in run.state.message
    run.handle(TaskFailed(3.0, "select/0/secret-hospital", "DiskError: no room"))
    assert not named(run, "secret", "room")


def test_a_closed_round_shows_a_site_its_own_part() -> None:
    run = enrolled(min_sites=2)
    for name in ("kim", "lee"):
        join(run, name)
    select(run, "ab")
    for site in "ab":
        update(run, site)
    aggregate(run, 1)
    (closed,) = site_status_of(run.state, "a").closed_rounds
    assert (list(closed.contributors), closed.contributor_count, closed.samples) == (["a"], 2, 10)
    assert [site.site for site in site_status_of(run.state, "").sites] == []


def test_the_end_of_a_run_tells_a_site_its_own_failure_alone() -> None:
    run = started(rounds=1)
    for site in "ab":
        fail(run, site)
    run.state.sites["b"].last_error = "DiskError: no room"
    aggregate(run, 1)
    assert run.state.phase is Phase.FAILED
    said = "no site delivered an update in any round, the adapter is untrained"
    assert run.state.message == f"{said}; last failures: site a: no memory; site b: DiskError: no room"
    assert for_site(run.state, "a") == f"{said}; this site's last failure: no memory"
    with pytest.raises(EnrollmentRefused) as caught:
        admit(run.state, "kim", None)
    assert str(caught.value) == f"the run is over ({said}); it takes no new site"


def test_losses_and_evaluations_depend_on_no_order_of_arrival() -> None:
    losses = {"a": 0.1, "b": 1e9, "c": 0.7, "d": -1e9}
    results = set()
    for order in permutations("abcd"):
        run = started("abcd", rounds=1)
        for site in order:
            result = pb.TrainResult(update=artifact(7).to_proto(), samples=5, loss=losses[site])
            received(run, f"train/1/{site}", result, artifact(7))
        aggregate(run, 1)
        sums = {
            site: Evaluation(rows=1, metrics={"loss": MetricSum(value_sum=losses[site], weight=0.1)}) for site in order
        }
        results.add((run.state.closed_rounds[0].loss, *means_of(sums)[1].values()))
    assert len(results) == 1
