"""Secure rounds, coordinator and sites together in this process: the sum is right, or there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedhds.errors import RequestError, SettingsError
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.v2 import federation_pb2
from fedhds.v2 import secure_pb2 as pb
from fedhds_server.run.events import SiteEvicted
from fedhds_server.run.state import Phase, RunState
from fedhds_server.settings import ServerSettings
from fedhds_server.workflows import WORKFLOWS
from fedhds_server.workflows.secure_training import Step
from tests.support.manifests import lora_manifest
from tests.support.secure_rounds import KIND, LOSS, SecureRun, plain_values

WIDE = lora_manifest({"q.lora_A.weight": (8, 256), "q.lora_B.weight": (256, 8)})
KINDS = ["RoundKeys", "SealedShares", "MaskedUpdate", "SignedSurvivors", "UnmaskingShares"]


def expected(names: str, lost: dict[int, Collection[str]], least: int = 3) -> set[str] | None:
    """The sites whose updates are in the sum; None when the round ends without one."""
    left = set(names) - set(lost.get(0, ()))
    if len(left) < least:
        return None
    members = len(left)
    threshold = max(-(-2 * members // 3), members // 2 + 1)
    summed = left
    for step in range(1, 5):
        left = left - set(lost.get(step, ()))
        if len(left) < threshold or (step <= Step.MASK and len(left) < least):
            return None
        summed = left if step == Step.MASK else summed
    return summed


def check(run: SecureRun, summed: set[str] | None) -> None:
    """The round's result is the plain mean of the same rounded updates, value by value; or there is none."""
    closed = run.state.closed_rounds[-1]
    if summed is None:
        assert closed.contributions == {}
        assert run.state.adapter == run.state.adapters[0]
        return
    assert closed.contributions == {site: run.rows.get(site, 5) for site in sorted(summed)}
    plain = plain_values(run, len(run.weights), {site: run.weights[site] for site in summed})
    secure = run.values()
    assert all((secure[name] == plain[name]).all() for name in plain)
    assert closed.loss == pytest.approx(LOSS, abs=1e-3)


@st.composite
def losses(draw: st.DrawFn) -> tuple[str, dict[int, Collection[str]]]:
    """Sites, and which of them go away before which step."""
    names = "abcdefg"[: draw(st.integers(3, 7))]
    steps = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 9, 9, 9]), min_size=len(names), max_size=len(names)))
    return names, {step: {site for site, at in zip(names, steps, strict=True) if at == step} for step in range(5)}


@given(losses())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sites_that_go_away_at_any_step(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[str, dict[int, Collection[str]]]
) -> None:
    names, lost = case
    run = SecureRun(tmp_path_factory.mktemp("run"), tuple(names), {"quorum": "1", "deadline": 1})
    run.play(lost)
    check(run, expected(names, lost))
    assert not run.failures


@pytest.mark.parametrize("step", range(1, 5))
@pytest.mark.parametrize("gone", [("d",), ("a",), ("b", "c")])
def test_every_set_of_dropouts_of_four_sites_at_each_step(tmp_path: Path, step: int, gone: tuple[str, ...]) -> None:
    run = SecureRun(tmp_path, tuple("abcd"), {"deadline": 1})
    run.play({step: gone})
    check(run, expected("abcd", {step: gone}))


def test_rounds_follow_each_other_under_new_keys(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abc"), rows={"a": 50, "b": 5, "c": 1})
    for _ in range(2):
        run.play()
    check_weights = [run.weights[site] for site in "abc"]
    assert check_weights[0] > 9 * check_weights[1] > 9 * check_weights[2] > 0
    keys = [pb.RoundKeys.FromString(content) for _, kind, content in run.received if kind == "RoundKeys"]
    public = [key for each in keys for key in (each.share_key, each.mask_key, each.seed_digest)]
    assert len(set(public)) == len(public) == 2 * 3 * 3
    masked = [content for _, kind, content in run.received if kind == "MaskedUpdate"]
    assert len(set(masked)) == len(masked) == 6


def test_too_few_sites_end_the_round_and_three_such_rounds_the_run(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abc"))
    run.play({2: ["a"]})
    assert [kind for _, kind, _ in run.received][-2:] == ["MaskedUpdate"] * 2
    # Nobody was asked to sign or to open anything, and nothing of the sum is left.
    assert {kind for _, kind, _ in run.received} == set(KINDS[:3])
    # With two sites of three, further rounds are not run.
    while not run.state.phase.over:
        run.play()
    assert run.state.phase is Phase.FAILED
    assert len(run.state.closed_rounds) == 3
    assert "no site delivered an update in 3 rounds" in run.state.end_message
    assert run.state.artifacts == {run.state.adapter}


def test_a_site_that_refuses_a_step_is_left_out(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcdef"))
    (tmp_path / "sites" / "a").mkdir(parents=True)
    (tmp_path / "sites" / "a" / "secure-round.json").write_text("damaged")
    run.play()
    assert "is damaged" in str(run.failures["a"])
    check(run, set("bcdef"))


def test_an_evicted_site_is_not_in_the_sum(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcdef"))
    for _ in range(2):
        for site in "abcdef":
            run.respond(site)
        run.close()
    for site in "abcde":
        run.respond(site)
    run.machine.apply(SiteEvicted(0.0, "a", "test"))
    run.respond("f")
    run.close()
    run.play()
    assert run.state.closed_rounds[0].contributions.keys() == set("bcdef")
    check(run, set("bcdef"))


def test_a_damaged_masked_update_counts_as_dropped(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcdef"))
    for _ in range(2):
        for site in "abcdef":
            run.respond(site)
        run.close()
    for site in "abcdef":
        run.respond(site)
    assert run.state.stage is not None
    artifact = run.state.stage.replies["b"].artifact
    assert artifact is not None
    run.store.path(artifact).write_bytes(bytes(artifact.size))
    run.close()
    run.play()
    check(run, set("acdef"))


def test_wrong_shares_of_one_site_end_the_round_and_name_it(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcd"))
    for _ in range(4):
        for site in "abcd":
            run.respond(site)
        run.close()
    for site in "abcd":
        request = run.asked(site)
        answer, _ = run.answer(site, request)
        assert isinstance(answer, pb.UnmaskingShares)
        for share in answer.opened:
            if share.owner == "c" and site == "a":
                share.seed_share = bytes(33)
        run.take(site, answer)
    outcome = WORKFLOWS[KIND].resolve(run.state, _closed(run), run.effects)
    assert "the shares of c do not give the secret that it announced" in str(outcome)
    run.close()
    check(run, None)


def _closed(run: SecureRun) -> Any:
    run.machine._moved_at = 0.0
    run.machine.advance()
    assert run.state.stage is not None
    assert run.state.stage.closed
    return run.state.stage


@pytest.mark.parametrize("fault", ["weight", "norm"])
def test_a_sum_that_no_honest_sites_give_is_not_used(tmp_path: Path, fault: str) -> None:
    run = SecureRun(tmp_path, tuple("abc"), {"secure_clip_norm": 0.5})
    for _ in range(2):
        for site in "abc":
            run.respond(site)
        run.close()
    for site in "abc":
        answer, path = run.answer(site, run.asked(site))
        content = bytearray(path.read_bytes() if path else b"")
        if site == "b":
            integers = np.frombuffer(content, dtype="<u4")
            if fault == "weight":
                integers[:1] += np.uint32(1)
            else:
                integers[2:] += np.uint32(1 << 30)
            assert isinstance(answer, pb.MaskedUpdate)
            # A dishonest site signs what it sends.
            answer = _signed(run, site, run.stored(bytes(content)))
        assert run.take(site, answer, bytes(content)) is None
    run.close()
    run.play()
    check(run, None)


def _signed(run: SecureRun, site: str, artifact: Artifact) -> pb.MaskedUpdate:
    path = run.folder / "sites" / site / "secure-round.json"
    answer = run.site_round(site).keep_masked(artifact)
    assert path.exists()
    return answer


# What the coordinator receives, given the sum.


def test_what_is_received_says_nothing_of_single_updates(tmp_path: Path) -> None:
    """Two sets of updates with one sum: the integers of each upload are uniform under both, and so are differences.

    Chi-square over 64 cells of the leading bits of 4,096 integers; 63 degrees of freedom exceed 140 once in 10^7 tests,
    and 12 are made.
    """
    sums = []
    for name, added in (("one", (0.03, -0.01, 0.01)), ("other", (0.01, 0.01, 0.01))):
        updates = dict(zip("abc", added, strict=True))
        run = SecureRun(tmp_path / name, tuple("abc"), updates=updates, manifest=WIDE)
        run.play()
        uploads = [np.frombuffer(data, "<u4")[2:] for _, kind, data in run.received if kind == "MaskedUpdate"]
        assert [len(upload) for upload in uploads] == [4096] * 3
        for site in range(3):
            assert _chi_square(uploads[site]) < 140
            # Of two sites together, too: what one adds the other does not take away while a third is there.
            assert _chi_square(uploads[site] - uploads[site - 1]) < 140
            # Without masks, the same test sees the updates.
            assert _chi_square(run.rounded["abc"[site]].astype(np.uint32)) > 1000
        sums.append(run.values()["q.lora_B.weight"])
    assert sums[0] == pytest.approx(sums[1], abs=1e-6)


def _chi_square(values: Any) -> float:
    cells = Counter((values.reshape(-1) >> np.uint32(26)).tolist())
    mean = values.size / 64
    return float(sum((cells[cell] - mean) ** 2 / mean for cell in range(64)))


# What the coordinator does not take from a site.


def test_results_that_are_no_answers_are_rejected(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abcd"))
    keys = run.site_round("a").keys()
    faults: list[tuple[dict[str, Any], str]] = [
        ({"site": "b"}, "another name"),
        ({"share_key": b"short"}, "32 bytes"),
        ({"adapter_digest": "0" * 64}, "another global adapter"),
        ({"certificates": run.site_round("b").keys().certificates}, "another certificate"),
        ({"certificates": [b"none"]}, "cannot be read"),
        ({"mask_key": keys.share_key}, "did not sign"),
        ({"signature": b""}, "did not sign"),
    ]
    for fault, reason in faults:
        wrong = pb.RoundKeys()
        wrong.CopyFrom(keys)
        for name, value in fault.items():
            wrong.ClearField(name)  # type: ignore[arg-type]
            wrong.MergeFrom(pb.RoundKeys(**{name: value}))
        rejection = run.take("a", wrong)
        assert rejection is not None
        assert reason in rejection[1]
    with pytest.raises(RequestError, match=r"takes a fedhds\.v2\.RoundKeys"):
        run.take("a", federation_pb2.TrainResult(samples=1))
    for site in "abcd":
        run.respond(site)
    run.close()
    shares, _ = run.answer("a", run.asked("a"))
    assert isinstance(shares, pb.SealedShares)
    del shares.shares[1]
    rejection = run.take("a", shares)
    assert rejection is not None
    assert "not one for each site" in rejection[1]
    for site in "abcd":
        run.respond(site)
    run.close()
    answer, path = run.answer("a", run.asked("a"))
    assert isinstance(answer, pb.MaskedUpdate)
    assert path is not None
    for field, value in (("clipped_to", 11.0), ("signature", b"x")):
        other = pb.MaskedUpdate()
        other.CopyFrom(answer)
        setattr(other, field, value)
        assert run.take("a", other, path.read_bytes()) is not None
    for site in "abcd":
        run.respond(site)
    run.close()
    signed, _ = run.answer("a", run.asked("a"))
    assert run.take("b", signed) is not None
    for site in "abcd":
        run.respond(site)
    run.close()
    opened, _ = run.answer("a", run.asked("a"))
    assert isinstance(opened, pb.UnmaskingShares)
    opened.opened[0].key_share = bytes(33)
    rejection = run.take("a", opened)
    assert rejection is not None
    assert "none that this round opens" in rejection[1]


def test_a_step_takes_no_upload_but_its_own(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abc"))
    workflow = WORKFLOWS[KIND]

    def sizes() -> range:
        assert run.state.stage is not None
        return workflow.upload_sizes(run.state, run.state.tasks[run.state.stage.task_id("a")])

    assert not sizes()
    for step in range(1, 5):
        for site in "abc":
            run.respond(site)
        run.close()
        assert bool(sizes()) == (step != Step.LISTS)
        if step == Step.MASK:
            assert sizes() == range(4 * (2 + 14), 4 * (2 + 14) + 1)
        result = AnyMessage()
        result.Pack(federation_pb2.TrainResult())
        assert run.state.stage is not None
        task = run.state.tasks[run.state.stage.task_id("a")]
        if step in (Step.SHARES, Step.UNMASK):
            with pytest.raises(RequestError, match="not a"):
                workflow.check_long(run.state, task, result, lambda _: b"")
        else:
            with pytest.raises(RequestError, match="not a"):
                workflow.check(run.state, task, result)


def test_the_state_of_every_step_is_read_again(tmp_path: Path) -> None:
    run = SecureRun(tmp_path, tuple("abc"))
    for _ in range(4):
        for site in "abc":
            run.respond(site)
        run.close()
        assert RunState.model_validate_json(run.state.model_dump_json()) == run.state
        assert run.state.stage is not None
        assert run.state.stage.secure is not None
        assert all(run.store.has(artifact) for artifact in run.state.artifacts)


# What it excludes.


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"aggregator": "svd"}, "single updates"),
        ({"robust_rule": "geometric-median", "min_sites": 9}, "compares single updates"),
        ({"wire_dtype": "int8"}, "do not add up"),
        ({"max_update_norm": 1.0}, "clip theirs"),
        ({"over_selection": 0.5}, "leaves behind"),
        ({"min_secure_sites": 2}, "greater than or equal to 3"),
        ({"secure_threshold": 0.5}, "greater than 0.5"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(changed: dict[str, Any], reason: str) -> None:
    spec = {"model": "m", "rounds": 1, "secure_aggregation": True, "min_sites": 5}
    assert RunSpec.of(**spec).secure.enabled
    with pytest.raises(ValidationError, match=reason):
        RunSpec.of(**{**spec, **changed})


@pytest.mark.parametrize("aggregator", ["fedavg", "alternating", "ffa"])
def test_means_are_allowed(aggregator: str) -> None:
    RunSpec.of(model="m", rounds=1, secure_aggregation=True, min_sites=5, aggregator=aggregator)


def test_the_coordinator_needs_tls_and_keeps_no_updates(tmp_path: Path) -> None:
    spec = RunSpec.of(model="m", rounds=1, secure_aggregation=True, min_sites=5)
    with pytest.raises(SettingsError, match="there is no TLS"):
        ServerSettings(run=spec).check_start()
    tls = {name: tmp_path / name for name in ("tls_ca", "tls_cert", "tls_key")}
    ServerSettings(run=spec, **tls).check_start()
    with pytest.raises(SettingsError, match="cannot begin with 4 sites"):
        ServerSettings(run=spec.replace(min_sites=4), **tls).check_start()
    ServerSettings(run=RunSpec.of(model="m", rounds=1)).check_start()
    with pytest.raises(ValidationError, match="no single update to keep"):
        ServerSettings(run=spec, keep_updates=True, **tls)
