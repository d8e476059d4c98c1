"""Which base model a run has: the first site's, until the operator says otherwise; and what a liar cannot keep."""

from __future__ import annotations

import pytest

from fedhds.errors import EnrollmentRefused, RequestError, RunOver
from fedhds.fingerprint import combined, is_digest
from fedhds_server.run.base_model import check_confirmation, check_model
from fedhds_server.run.engine import RunMachine
from fedhds_server.run.events import (
    AdapterDrawn,
    Discard,
    DrawAdapter,
    Instruction,
    ModelConfirmed,
    SiteConnected,
    SiteEvicted,
    SiteRegistered,
)
from fedhds_server.run.state import SiteState
from tests.support.machine import MANIFEST, artifact, doing, machine, work

HONEST = {"weights": "a" * 64, "config": "b" * 64, "tokenizer": "c" * 64, "template": "d" * 64, "feature_model": ""}
LIE = HONEST | {"weights": "f" * 64}


def register(run: RunMachine, site: str, fingerprint: dict[str, str]) -> list[Instruction]:
    run.handle(SiteConnected(site, "", f"s{site}"))
    return work(run.handle(SiteRegistered(1.0, site, 10, False, fingerprint, MANIFEST)))


def test_one_digest_stands_for_all_parts() -> None:
    assert is_digest(combined(HONEST))
    assert combined(HONEST) != combined(LIE)
    # A digest in another place is another fingerprint.
    assert combined(HONEST) != combined(HONEST | {"config": "c" * 64, "tokenizer": "b" * 64})
    assert combined({}) == ""


def test_who_is_refused_hears_who_said_so_first_while_nobody_has_confirmed_it() -> None:
    run = machine()
    register(run, "liar", LIE)
    with pytest.raises(EnrollmentRefused, match=r"the weights differs.*'liar' brought.*nobody has\s+confirmed it"):
        check_model(run.state, HONEST, MANIFEST)
    run.handle(ModelConfirmed(2.0, combined(LIE), "it is"))
    with pytest.raises(EnrollmentRefused, match="the operator expects"):
        check_model(run.state, HONEST, MANIFEST)


def test_the_model_of_a_liar_goes_with_it_and_the_next_site_decides() -> None:
    run = machine()
    assert register(run, "liar", LIE) == [DrawAdapter()]
    run.handle(AdapterDrawn(2.0, artifact(1)))
    assert work(run.handle(SiteEvicted(3.0, "liar", "lies"))) == [Discard(artifact(1))]
    assert (run.state.fingerprint, run.state.manifest, run.state.adapters, run.state.model_given_by) == ({}, "", {}, "")
    check_model(run.state, HONEST, MANIFEST)
    assert register(run, "a", HONEST) == [DrawAdapter()]
    assert (run.state.fingerprint, run.state.model_given_by) == (HONEST, "a")


def test_the_model_stays_when_another_site_has_it_or_the_run_has_begun() -> None:
    run = machine(min_sites=3)
    for site in ("a", "b"):
        register(run, site, HONEST)
    run.handle(AdapterDrawn(2.0, artifact(1)))
    run.handle(SiteEvicted(3.0, "a", "broken"))
    assert run.state.fingerprint == HONEST
    for site in ("c", "d"):
        register(run, site, HONEST)
    assert doing(run) != "enrolling"
    for site in ("b", "c", "d"):
        run.handle(SiteEvicted(4.0, site, "broken"))
    assert run.state.fingerprint == HONEST


def test_confirming_another_model_before_the_run_begins_sends_its_sites_back() -> None:
    run = machine(min_sites=3)
    for site in ("x", "y"):
        register(run, site, LIE)
    run.handle(AdapterDrawn(2.0, artifact(1)))
    check_confirmation(run.state, combined(HONEST))
    assert work(run.handle(ModelConfirmed(3.0, combined(HONEST), "by telephone"))) == [Discard(artifact(1))]
    for known in run.state.sites.values():
        assert (known.state, known.session, known.rows) == (SiteState.LEFT, "", 0)
    with pytest.raises(EnrollmentRefused, match="the operator expects"):
        check_model(run.state, LIE, MANIFEST)
    assert register(run, "a", HONEST) == [DrawAdapter()]


def test_a_model_is_confirmed_as_it_is_also_later_but_not_another() -> None:
    run = machine(min_sites=1)
    register(run, "a", HONEST)
    run.handle(AdapterDrawn(2.0, artifact(1)))
    assert doing(run) != "enrolling"
    check_confirmation(run.state, combined(HONEST))
    assert work(run.handle(ModelConfirmed(3.0, combined(HONEST), "yes"))) == []
    assert run.state.expected_fingerprint == combined(HONEST)
    with pytest.raises(RunOver, match="has begun with the fingerprint"):
        check_confirmation(run.state, combined(LIE))
    with pytest.raises(RequestError, match="64 hexadecimal digits"):
        check_confirmation(run.state, "HONEST")
