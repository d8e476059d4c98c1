"""All sites of one certificate count as one: in quorums, cohorts, weights and quarantine."""

from __future__ import annotations

import pytest

from fedhds_server.aggregation.weights import bounded_shares, site_shares
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import AdapterDrawn, CoresetsSelected, ResultRejected
from fedhds_server.run.parties import parties, party_of
from fedhds_server.run.quorum import CohortProgress, draw
from tests.support.machine import ALL_ROWS, aggregate, artifact, doing, enrolled, join, machine, resolve, update

MANY = [f"m/{number}" for number in range(18)]


def training(*sites: str, **settings: object) -> RunMachine:
    """A run of `sites`, each of which has all its rows to train on."""
    run = machine(**{"min_sites": len(parties(sites))} | settings)  # type: ignore[arg-type]
    for site in sites:
        join(run, site)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    resolve(run, CoresetsSelected(dict.fromkeys(sites, ALL_ROWS)))
    assert doing(run) == "training"
    return run


def test_a_party_is_what_comes_before_the_first_slash() -> None:
    assert [party_of(name) for name in ("a", "a/b", "a/b/c", "a-b")] == ["a", "a", "a", "a-b"]


def test_eighteen_names_of_one_certificate_have_the_weight_of_one() -> None:
    samples = {"a": 10, "b": 10, **dict.fromkeys(MANY, 10)}
    shares = site_shares(samples, 0.1)
    assert sum(shares[site] for site in MANY) == pytest.approx(1 / 3)
    assert shares["a"] == shares["b"] == pytest.approx(1 / 3)
    assert sum(site_shares(samples, 0.5)[site] for site in MANY) == pytest.approx(0.5)


def test_the_shares_of_sites_that_are_alone_in_their_parties_are_unchanged_to_the_bit() -> None:
    samples = {"a": 7, "b": 13, "c": 10**6, "d": 0}
    assert list(site_shares(samples, 0.4).values()) == [float(x) for x in bounded_shares(list(samples.values()), 0.4)]


def test_a_run_starts_with_enough_parties_not_with_enough_names() -> None:
    run = machine(min_sites=2)
    for site in MANY:
        join(run, site)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert doing(run) == "enrolling"
    assert run.state.message == "waiting for 1 more site"
    join(run, "a")
    assert doing(run) != "enrolling"


def test_evaluators_of_one_party_count_as_one() -> None:
    run = machine(min_sites=1, min_evaluators=2)
    join(run, "a")
    for site in ("m/1", "m/2"):
        join(run, site, 0, evaluates=True)
    run.handle(AdapterDrawn(2.0, artifact(0)))
    assert run.state.message == "waiting for 1 more evaluator"


def test_a_cohort_is_drawn_of_parties() -> None:
    sites = ["a", "b", "c", *MANY]
    draws = [draw(sites, 2, seed=seed, round_number=1) for seed in range(40)]
    assert all(len(parties(drawn)) == 2 for drawn in draws)
    assert all(set(MANY) <= set(drawn) or not set(MANY) & set(drawn) for drawn in draws)
    assert 10 <= sum("m/0" in drawn for drawn in draws) <= 30, "it is drawn as often as any other"


def test_a_quorum_needs_parties() -> None:
    run = training("a", "b", "m/1", "m/2", "m/3", quorum="2", deadline=1.0)
    for number, site in enumerate(("m/1", "m/2", "m/3"), 7):
        update(run, site, number)
    progress = CohortProgress.of(run.state)
    assert progress
    assert progress.target == 3
    assert progress.message.startswith("1 of 3 updates")
    update(run, "a", 20)
    update(run, "b", 21)
    assert doing(run) == "aggregating"


def test_fast_names_of_one_party_do_not_close_a_round_for_the_others() -> None:
    run = training("a", "b", "m/1", "m/2", "m/3", over_selection=0.5, cohort_fraction=0.67)
    assert run.state.stage
    assert run.state.stage.target == 2
    for number, site in enumerate(("m/1", "m/2", "m/3"), 7):
        update(run, site, number)
    assert doing(run) == "training"
    update(run, "a", 20)
    assert doing(run) == "aggregating"


def test_a_round_does_not_close_at_its_target_without_the_other_sites_of_a_party_that_answered() -> None:
    run = training("a", "b/1", "b/2", over_selection=0.5)
    update(run, "a", 7)
    update(run, "b/1", 8)
    assert doing(run) == "training"
    update(run, "b/2", 9)
    assert doing(run) == "aggregating"
    aggregate(run, 1)
    assert set(run.state.closed_rounds[0].contributions) == {"a", "b/1", "b/2"}


def test_rejections_of_all_its_names_put_a_party_into_quarantine() -> None:
    run = training("a", "m/1", "m/2", "m/3")
    for site in ("m/1", "m/2"):
        run.handle(ResultRejected(4.0, f"train/1/{site}", "no adapter"))
    assert not any(site.quarantined for site in run.state.sites.values())
    instructions = run.handle(ResultRejected(4.0, "train/1/m/3", "no adapter"))
    assert [name for name, site in run.state.sites.items() if site.quarantined] == ["m/1", "m/2", "m/3"]
    assert "m with its sites m/1, m/2, m/3 is quarantined after 3 rejected results" in str(instructions)
    assert {task.site for task in run.state.tasks.values()} == {"a"}
    join(run, "m/4")
    assert run.state.sites["m/4"].quarantined, "nor does a new name help"
    assert enrolled("ab").state.trainers == ["a", "b"]
