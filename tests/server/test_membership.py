"""Who may take part."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedhds.errors import EnrollmentRefused, NameInUse
from fedhds.security.identity import PeerIdentity, Role
from fedhds.spec import RunSpec
from fedhds_server.run.membership import admit, check_registration, negotiate, session_digest, session_secret
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
    assert admit(new, "a/shard-1", SITE_A, "") == SITE_A.key_fingerprint
    for name in ("b", "ab", "a-1"):
        with pytest.raises(EnrollmentRefused, match="does not give the name"):
            admit(new, name, SITE_A, "")
    # TLS lets both in: an operator to steer the run, a coordinator to ask itself for its health.
    for role in (Role.OPERATOR, Role.COORDINATOR):
        with pytest.raises(EnrollmentRefused, match="--role site"):
            admit(new, "o", PeerIdentity("o", role, "k"), "")


@pytest.mark.parametrize("name", ["", "x" * 129, "a\nb"])
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
