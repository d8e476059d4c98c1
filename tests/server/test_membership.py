"""Who may take part."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedhds.errors import EnrollmentRefused, Evicted, NameInUse
from fedhds.security.identity import PeerIdentity, Role
from fedhds.spec import RunSpec
from fedhds_server.run.events import SiteEvicted, SiteRevoked
from fedhds_server.run.membership import (
    Limits,
    admit,
    check_registration,
    evicted,
    negotiate,
    revoked,
    session_digest,
    session_secret,
)
from fedhds_server.run.state import Phase, RunState, Site, SiteState, packed
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 4)})
FINGERPRINT = {"weights": "1", "config": "2", "tokenizer": "3", "template": "4", "feature_model": ""}
SITE_A = PeerIdentity("a", Role.SITE, "k" * 64)


def state_with(**fields: object) -> RunState:
    state = RunState(run_id="r", spec=RunSpec.of(model="m", rounds=1))
    if fields:
        state.sites["a"] = Site.model_validate({"name": "a", "session": session_digest("secret")} | fields)
    return state


def test_protocol_versions_are_negotiated() -> None:
    assert negotiate([1, 2, 7]) == 2
    for offered in ([7], [1], []):
        with pytest.raises(EnrollmentRefused, match="no common protocol version"):
            negotiate(offered)


def test_without_tls_a_live_name_needs_its_session() -> None:
    live = state_with(state=SiteState.ENROLLED)
    with pytest.raises(NameInUse, match="another process is enrolled as 'a'"):
        admit(live, "a", None, "")
    assert admit(live, "a", None, "secret") == ""


def test_without_tls_a_repeated_enrollment_is_known_by_the_session_that_it_proposes() -> None:
    assert admit(state_with(state=SiteState.CONNECTING), "a", None, "", "secret") == ""


def test_a_proposed_session_must_not_be_guessable() -> None:
    assert session_secret("ab" * 32) == "ab" * 32
    assert session_secret("") != session_secret("")
    for weak in ("a", "A" * 64, "0" * 63 + "\n"):
        with pytest.raises(EnrollmentRefused, match="64 hexadecimal digits"):
            session_secret(weak)


@pytest.mark.parametrize("gone", [SiteState.LOST, SiteState.LEFT])
def test_without_tls_the_name_of_a_site_that_is_gone_is_free(gone: SiteState) -> None:
    assert admit(state_with(state=gone), "a", None, "") == ""


def test_with_tls_the_same_key_takes_over_and_another_is_refused() -> None:
    live = state_with(state=SiteState.ENROLLED, key=SITE_A.key_fingerprint)
    assert admit(live, "a", SITE_A, "") == SITE_A.key_fingerprint
    with pytest.raises(NameInUse, match="another key"):
        admit(live, "a", PeerIdentity("a", Role.SITE, "x" * 64), "secret")


def test_with_tls_the_certificate_gives_the_name() -> None:
    new = state_with()
    assert admit(new, "a", SITE_A, "") == SITE_A.key_fingerprint
    assert admit(new, "a/shard-1", SITE_A, "", limits=Limits(max_shards=2)) == SITE_A.key_fingerprint
    for name in ("b", "ab", "a-1", "b/a"):
        with pytest.raises(EnrollmentRefused, match="does not give the name"):
            admit(new, name, SITE_A, "")
    # TLS lets both in: an operator to steer the run, a coordinator to ask itself for its health.
    for role in (Role.OPERATOR, Role.COORDINATOR):
        with pytest.raises(EnrollmentRefused, match="--role site"):
            admit(new, "o", PeerIdentity("o", role, "k"), "")


def test_shards_are_as_many_as_the_operator_allows() -> None:
    state = state_with(key=SITE_A.key_fingerprint)
    with pytest.raises(EnrollmentRefused, match=r"'a' itself and not 'a/1'.*--max-shards"):
        admit(state, "a/1", SITE_A, "")
    two = Limits(max_shards=2)
    assert admit(state, "a/1", SITE_A, "", limits=two)
    state.sites["a/1"] = Site(name="a/1", key=SITE_A.key_fingerprint, state=SiteState.LEFT)
    with pytest.raises(EnrollmentRefused, match="has enrolled 2 sites"):
        admit(state, "a/2", SITE_A, "", limits=two)
    # A site that is known comes back, also when the operator lowers the limit.
    assert admit(state, "a/1", SITE_A, "") == SITE_A.key_fingerprint


def test_a_name_has_one_key_in_all_its_shards_and_a_key_one_name() -> None:
    state = state_with(key=SITE_A.key_fingerprint)
    with pytest.raises(NameInUse, match="another key"):
        admit(state, "a/1", PeerIdentity("a", Role.SITE, "x" * 64), "", limits=Limits(max_shards=9))
    with pytest.raises(EnrollmentRefused, match="the certificate of 'b' has the key of 'a'"):
        admit(state, "b", PeerIdentity("b", Role.SITE, SITE_A.key_fingerprint), "")


@pytest.mark.parametrize("who", ["a", "a/1", SITE_A.key_fingerprint])
def test_an_evicted_party_does_not_come_back_under_another_name_of_its_certificate(who: str) -> None:
    state = state_with(key=SITE_A.key_fingerprint)
    state.sites["a/1"] = Site(name="a/1", key=SITE_A.key_fingerprint)
    state.sites["b"] = Site(name="b", key="b" * 64)
    evicted(state, SiteEvicted(1.0, who, "hostile"))
    assert {site.name for site in state.sites.values() if site.state is SiteState.EVICTED} == {"a", "a/1"}
    for name in ("a", "a/1", "a/2"):
        with pytest.raises(Evicted, match="evicted 'a' from this run: hostile"):
            admit(state, name, SITE_A, "", limits=Limits(max_shards=9))
    with pytest.raises(Evicted):
        # The same key in a certificate of another name.
        admit(state, "c", PeerIdentity("c", Role.SITE, SITE_A.key_fingerprint), "")
    assert admit(state, "c", PeerIdentity("c", Role.SITE, "c" * 64), "")


def test_a_key_is_evicted_before_it_enrolls() -> None:
    state = state_with()
    evicted(state, SiteEvicted(1.0, SITE_A.key_fingerprint, "stolen"))
    assert RunState.model_validate_json(state.model_dump_json()).evicted
    with pytest.raises(Evicted, match="stolen"):
        admit(state, "a", SITE_A, "")


def test_rows_are_bounded_by_certificate_and_counted_once() -> None:
    state, limits = state_with(), Limits(max_shards=3, max_rows=100)
    for name, rows in (("a", 60), ("a/1", 30), ("b", 100)):
        check_registration(state, FINGERPRINT, MANIFEST, rows, False, site=name, limits=limits)
        state.sites[name] = Site(name=name, rows=rows, state=SiteState.ENROLLED)
    check_registration(state, FINGERPRINT, MANIFEST, 70, False, site="a", limits=limits)
    with pytest.raises(EnrollmentRefused, match=r"71 rows, and the other sites of its certificate 30; .* 100, .*-rows"):
        check_registration(state, FINGERPRINT, MANIFEST, 71, False, site="a", limits=limits)
    with pytest.raises(EnrollmentRefused, match="11 rows"):
        check_registration(state, FINGERPRINT, MANIFEST, 11, False, site="a/2", limits=limits)
    with pytest.raises(EnrollmentRefused, match="101 held-out rows"):
        check_registration(state, FINGERPRINT, MANIFEST, 1, True, site="c", evaluation_rows=101, limits=limits)


def test_many_certificates_with_as_many_rows_as_they_may_declare_lock_nobody_out() -> None:
    state = state_with()
    for number in range(100):
        state.sites[str(number)] = Site(name=str(number), rows=Limits().max_rows, state=SiteState.ENROLLED)
    check_registration(state, FINGERPRINT, MANIFEST, 1000, False, site="honest")


def test_the_rows_of_who_is_out_do_not_count() -> None:
    state, limits = state_with(), Limits(max_rows=10**9)
    state.sites["a"] = Site(name="a", rows=10**9 - 10, state=SiteState.ENROLLED)
    with pytest.raises(EnrollmentRefused, match="the others 999999990"):
        check_registration(state, FINGERPRINT, MANIFEST, 10, False, site="b", limits=limits)
    evicted(state, SiteEvicted(1.0, "a", "hostile"))
    check_registration(state, FINGERPRINT, MANIFEST, 10, False, site="b", limits=limits)


def test_held_out_rows_are_declared_by_those_who_evaluate_and_by_nobody_else() -> None:
    check_registration(state_with(), FINGERPRINT, MANIFEST, 0, True, site="a", evaluation_rows=5)
    for evaluates, rows in ((True, 0), (False, 5)):
        with pytest.raises(EnrollmentRefused, match="declares its held-out rows"):
            check_registration(state_with(), FINGERPRINT, MANIFEST, 1, evaluates, site="a", evaluation_rows=rows)


def test_a_revoked_site_is_out_until_the_lists_let_it_in_again() -> None:
    state = state_with(state=SiteState.ENROLLED, rows=5)
    revoked(state, SiteRevoked(1.0, "a", "its certificate is revoked"))
    assert (state.sites["a"].state, state.sites["a"].session) == (SiteState.LEFT, "")
    assert admit(state, "a", None, "secret") == ""


@pytest.mark.parametrize("name", ["", "/", "/a", "x" * 129, "a\nb"])
def test_names_are_checked(name: str) -> None:
    with pytest.raises(EnrollmentRefused, match="1 to 128"):
        admit(state_with(), name, None, "")


def test_a_run_that_is_over_takes_no_new_site() -> None:
    over = state_with()
    over.phase = Phase.COMPLETED
    with pytest.raises(EnrollmentRefused, match="over"):
        admit(over, "a", None, "")


def test_another_base_model_is_refused_saying_what_differs() -> None:
    state = state_with()
    check_registration(state, FINGERPRINT, MANIFEST, 1, False)
    state.fingerprint, state.manifest = FINGERPRINT, packed(MANIFEST.to_proto())
    check_registration(state, FINGERPRINT, MANIFEST, 1, False)
    with pytest.raises(EnrollmentRefused, match="the weights, the tokenizer differ;"):
        check_registration(state, FINGERPRINT | {"weights": "x", "tokenizer": "y"}, MANIFEST, 1, False)
    other = lora_manifest({"k.lora_A.weight": (2, 4)})
    with pytest.raises(EnrollmentRefused, match="other tensors"):
        check_registration(state, FINGERPRINT, other, 1, False)


def test_another_configuration_of_the_adapter_is_refused_but_not_another_version_of_peft() -> None:
    state = state_with()
    shapes: dict[str, tuple[int, ...]] = {"q.lora_A.weight": (2, 4)}
    state.fingerprint = FINGERPRINT
    state.manifest = packed(lora_manifest(shapes, '{"r": 2, "peft_version": "1"}').to_proto())
    check_registration(state, FINGERPRINT, lora_manifest(shapes, '{"peft_version": "2", "r": 2}'), 1, False)
    with pytest.raises(EnrollmentRefused, match="another configuration"):
        check_registration(state, FINGERPRINT, lora_manifest(shapes, '{"r": 2, "use_dora": true}'), 1, False)


def test_an_adapter_that_names_another_base_model_is_refused_from_the_first_site_on() -> None:
    state = state_with()
    named = lora_manifest({"q.lora_A.weight": (2, 4)}, json.dumps({"base_model_name_or_path": state.spec.model.name}))
    check_registration(state, FINGERPRINT, named, 1, False)
    other = replace(named, config='{"base_model_name_or_path": "/home/somebody/model"}')
    with pytest.raises(EnrollmentRefused, match="another base model"):
        check_registration(state, FINGERPRINT, other, 1, False)


def test_a_site_must_bring_something() -> None:
    with pytest.raises(EnrollmentRefused, match="neither"):
        check_registration(state_with(), FINGERPRINT, MANIFEST, 0, False)
    with pytest.raises(EnrollmentRefused, match="no complete fingerprint"):
        check_registration(state_with(), {"weights": "1"}, MANIFEST, 1, False)
