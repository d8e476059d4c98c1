"""One certificate is one site, the operator says who takes part and with which base model, and claims are bounded."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from fedhds.errors import EnrollmentRefused, Evicted, FedhdsError, RequestError
from fedhds.fingerprint import combined
from fedhds.grpc_errors import error_of
from fedhds.security.identity import Role, identity_from_certificate
from fedhds.security.pki import issue
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.state import SiteState
from tests.hostile.conftest import Secured, Undisturbed
from tests.support.attackers import ROWS, Attacker, SecureFederation
from tests.support.hostile import until
from tests.support.programs import BIN

pytestmark = pytest.mark.e2e

MANY = 18


def refused(call: Callable[[], Any]) -> FedhdsError:
    """What the coordinator answers to a call that it refuses."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = error_of(caught.value)
    assert error is not None, caught.value
    return error


def key_of(federation: SecureFederation, name: str) -> str:
    return identity_from_certificate(federation.certificate(name).cert.read_bytes()).key_fingerprint


def operate(federation: SecureFederation, *command: str) -> str:
    """The output of a command of the toolbox, called by an operator."""
    files = federation.certificate("alice", Role.OPERATOR)
    flags = [f"--tls-ca={files.ca}", f"--tls-cert={files.cert}", f"--tls-key={files.key}"]
    arguments = [str(BIN / "fedhds"), *command, f"--server={federation.address()}", *flags]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def revoked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of --revoked."""
    path = tmp_path_factory.mktemp("lists") / "revoked"
    path.write_text("# nobody yet\n")
    return path


@pytest.fixture(scope="module")
def federation(secured: Secured, undisturbed: Undisturbed, revoked: Path) -> Iterator[SecureFederation]:
    evaluators = revoked.with_name("evaluators")
    evaluators.write_text("measurer\n")
    flags = ("--rounds=2", "--min-sites=2")
    federation = secured(*flags, f"--revoked={revoked}", f"--evaluators={evaluators}", f"--max-shards={MANY}")
    # The attackers come late: they train no round.
    until(lambda: federation.state.round_number == 1)
    yield federation
    federation.finish()
    assert federation.adapter == undisturbed(*flags)


def names_of(federation: SecureFederation, party: str) -> list[Attacker]:
    """As many sites of one certificate as the operator allows."""
    sites = [federation.attacker(f"{party}/{number}") for number in range(MANY)]
    for site in sites:
        site.enroll()
        site.register()
    return sites


def test_a_certificate_has_as_many_names_as_the_operator_allows_and_evicting_one_evicts_all(
    federation: SecureFederation,
) -> None:
    sites = names_of(federation, "many")
    assert "--max-shards" in str(refused(federation.attacker("many/more").enroll))
    operate(federation, "evict", "many/3", "--reason", "a crowd")
    for site in sites:
        assert isinstance(refused(site.leave), Evicted)
    for name in ("many", "many/3", "many/another"):
        assert isinstance(refused(federation.attacker(name).enroll), Evicted)
    assert federation.state.sites["many/0"].state is SiteState.EVICTED


def test_a_key_is_evicted_in_advance(federation: SecureFederation) -> None:
    operate(federation, "evict", key_of(federation, "stolen"), "--reason", "stolen last night")
    error = refused(federation.attacker("stolen").enroll)
    assert isinstance(error, Evicted)
    assert "stolen last night" in str(error)


def test_a_name_has_one_key(federation: SecureFederation, tmp_path_factory: pytest.TempPathFactory) -> None:
    victim = federation.attacker("victim/1")
    victim.enroll()
    assert federation.tls is not None
    files = issue(federation.tls, "victim", role=Role.SITE, out=tmp_path_factory.mktemp("thief"))
    error = refused(federation.attacker("victim/2", files).enroll)
    assert "another key" in str(error)
    victim.leave()


def test_a_site_is_out_at_its_next_call_once_its_key_is_on_the_list_of_revoked_ones(
    federation: SecureFederation, revoked: Path
) -> None:
    site = federation.attacker("revoked")
    site.enroll()
    site.register()
    revoked.write_text(f"{key_of(federation, 'revoked')}\n")
    error = refused(lambda: site.stub.Heartbeat(pb.HeartbeatRequest(session=site.session)))
    assert isinstance(error, EnrollmentRefused)
    assert "the certificate of 'revoked' is revoked" in str(error)
    assert isinstance(refused(site.enroll), EnrollmentRefused)
    # A list that cannot be read leaves the one before in force, and the operator hears of it.
    revoked.write_bytes(b"\xff\xfe nothing")
    assert isinstance(refused(site.enroll), EnrollmentRefused)
    assert "--revoked: cannot use" in operate(federation, "status")
    assert "--revoked: cannot use" in federation.coordinator.text
    revoked.write_text("somebody-else\n")
    site.enroll()
    site.leave()
    assert "--revoked" not in operate(federation, "status")


def test_who_does_not_call_is_out_too(federation: SecureFederation, revoked: Path) -> None:
    site = federation.attacker("silent")
    site.enroll()
    revoked.write_text("silent\n")
    until(lambda: federation.state.sites["silent"].state is SiteState.LEFT)
    revoked.write_text("nobody\n")


def test_rows_are_bounded_and_shut_nobody_out(federation: SecureFederation) -> None:
    for name in ("greedy-1", "greedy-2"):
        greedy = federation.attacker(name)
        greedy.enroll()
        error = refused(partial(greedy.register, rows=10**8))
        assert "one certificate may bring 1000000" in str(error)
    many = federation.attacker("repeated")
    many.enroll()
    for _ in range(3):
        many.register(rows=900_000)
    assert federation.state.pool_rows < 10**6
    modest = federation.attacker("modest")
    modest.enroll()
    modest.register()
    modest.leave()
    many.leave()


def test_only_those_evaluate_whom_the_operator_lets_and_only_what_they_declared(federation: SecureFederation) -> None:
    liar, measurer = federation.attacker("liar"), federation.attacker("measurer")
    liar.enroll()
    assert "not on the list of sites that may evaluate" in str(refused(lambda: liar.register(evaluates=True)))
    measurer.enroll()
    measurer.register(rows=0, evaluates=True, evaluation_rows=5)
    task = measurer.task()
    assert task.kind == "evaluate"
    loss = {"loss": pb.MetricSum(value_sum=0.0, weight=10**9)}
    answer = measurer.complete(task.id, pb.EvaluationResult(rows=10**9, metrics=loss))
    assert (answer.accepted, answer.reason) == (
        False,
        "the evaluation claims 1000000000 rows, the site declared 5 held-out rows",
    )
    measurer.leave()
    assert not federation.state.evaluations


def test_what_is_no_digest_and_another_base_model_are_refused(federation: SecureFederation) -> None:
    site = federation.attacker("forger")
    site.enroll()
    known = federation.state.fingerprint
    words = pb.ModelFingerprint(**{**known, "weights": "# A better adapter\n\n[click](http://example.org)"})
    assert isinstance(refused(lambda: site.register(fingerprint=words)), RequestError)
    other = pb.ModelFingerprint(**{**known, "weights": "f" * 64})
    assert "the weights differs" in str(refused(lambda: site.register(fingerprint=other)))
    # The operator's word is on record; the honest sites' model is the run's.
    operate(federation, "confirm-model", combined(known))
    assert "confirmed" in operate(federation, "status")


def test_eighteen_names_have_the_weight_of_one(secured: Secured, undisturbed: Undisturbed) -> None:
    flags = ("--rounds=1", "--min-sites=3", "--max-weight-share=0.4", f"--max-shards={MANY}")
    # Else so large an update would be left out.
    federation = secured(*flags, "--update-norm-factor=0", names="a")
    federation.open_gate()
    sites = names_of(federation, "many")
    federation.honest("b")
    manifest = federation.state.adapter_manifest
    path = federation.folder / "ones.safetensors"
    ones = write_adapter(path, manifest, lambda tensor: np.ones(tensor.shape, np.float32), "float32")
    for site in sites:
        task = site.task()
        site.upload(path.read_bytes(), ones)
        result = pb.TrainResult(update=ones.to_proto(), samples=ROWS, loss=1.0)
        assert site.complete(task.id, result).accepted
    until(lambda: federation.state.phase.over)
    for site in sites:
        site.stub.ConfirmDelivery(pb.ConfirmDeliveryRequest(session=site.session))
        site.leave()
    federation.finish()
    expected, final = federation.folder / "expected.safetensors", federation.folder / "final.safetensors"
    expected.write_bytes(undisturbed("--rounds=1"))
    final.write_bytes(federation.adapter)
    with AdapterReader(final, manifest) as found, AdapterReader(expected, manifest) as honest:
        for spec in manifest.tensors:
            np.testing.assert_allclose(found.tensor(spec), 0.6 * honest.tensor(spec) + 0.4, rtol=1e-5)


def test_who_lies_about_the_base_model_first_is_evicted_and_the_honest_decide(
    federation: SecureFederation, secured: Secured, undisturbed: Undisturbed
) -> None:
    flags = ("--rounds=1", "--min-sites=2")
    known = federation.state
    other = secured(*flags, names="")
    liar = other.attacker("liar")
    liar.enroll()
    lie = pb.ModelFingerprint(**{**known.fingerprint, "weights": "f" * 64})
    manifest = known.adapter_manifest.to_proto()
    request = pb.RegisterRequest(session=liar.session, fingerprint=lie, manifest=manifest, rows=ROWS)
    liar.stub.Register(request)
    honest = other.honest("a")
    assert honest.wait() != 0
    assert "what site 'liar' brought, the first to register, and nobody has confirmed it" in honest.text
    other.sites.clear()
    assert "given by site liar, not confirmed" in operate(other, "status")
    operate(other, "evict", "liar", "--reason", "another model")
    for name in "ab":
        other.honest(name)
    other.finish()
    assert other.adapter == undisturbed(*flags)


def test_an_expected_fingerprint_holds_from_the_start(
    federation: SecureFederation, secured: Secured, undisturbed: Undisturbed
) -> None:
    flags, known = ("--rounds=1", "--min-sites=2"), federation.state
    other = secured(*flags, f"--expected-fingerprint={combined(known.fingerprint)}", names="")
    liar = other.attacker("liar")
    liar.enroll()
    lie = pb.ModelFingerprint(**{**known.fingerprint, "weights": "f" * 64})
    manifest = known.adapter_manifest.to_proto()
    request = pb.RegisterRequest(session=liar.session, fingerprint=lie, manifest=manifest, rows=ROWS)
    assert f"the operator expects {combined(known.fingerprint)}" in str(refused(lambda: liar.stub.Register(request)))
    printed = subprocess.run(
        [BIN / "fedhds", "fingerprint", str(other.model)], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == combined(known.fingerprint)
    for name in "ab":
        other.honest(name)
    other.finish()
    assert other.adapter == undisturbed(*flags)
