"""What breaks the systems that a user would pick instead: here the round goes on, and only who is at fault is left out.

Every test has its mirror: the healthy sites end well, and their adapter is byte for byte what they give alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.tensors.manifest import AdapterManifest, TensorSpec
from fedhds.tensors.safetensors import AdapterReader
from fedhds_server.run.activity import activity
from fedhds_server.run.state import Reply
from tests.support.federation import Daemon, Federation, free_port
from tests.support.hostile import Forgery, Hostile, state_of, until
from tests.support.sabotage import WAITING, sabotaged
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

FLAGS = ("--selection-strategy=full", "--evaluate-every=0")
CANARY = "patient-4711-is-HIV-positive"

CRASHING = f"""
import torch
import fedhds_client.training.loop as training

tries = 0

def step(*_):
    global tries
    tries += 1
    raise torch.OutOfMemoryError("{CANARY}") if tries == 1 else RuntimeError("{CANARY}")

training._step = step
"""

# The third chunk is never sent: the process hangs in mid-upload.
HANGING_UPLOAD = """
import time
from fedhds.transfer import chunks

honest, sent = chunks.upload_message, 0

def upload_message(chunk):
    global sent
    sent += 1
    if sent > 2:
        time.sleep(3600)
    return honest(chunk)

chunks.upload_message = upload_message
"""


def shard(folder: Path, name: str) -> Path:
    return write_rows(folder / f"{name}.jsonl", {name: 8})


def healthy(federation: Federation, run: str = "run", names: str = "ab") -> list[Daemon]:
    """The sites that do as they should."""
    address = federation.address(run)
    return [federation.client(name, f"--data={shard(federation.folder, name)}", server=address) for name in names]


def adapter_of(federation: Federation, run: str = "run") -> bytes:
    return (federation.folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes()


def report_of(federation: Federation, run: str = "run") -> dict[str, list[dict[str, object]]]:
    report: dict[str, list[dict[str, object]]] = json.loads((federation.folder / run / "report.json").read_text())
    return report


def received(federation: Federation, name: str) -> int:
    """Payload bytes that a site has sent."""
    (site,) = [site for site in report_of(federation)["sites"] if site["site"] == name]
    return int(str(site["bytes_received"]))


def replies(run: Path) -> dict[str, Reply]:
    """What the open stage has been given, by site."""
    stage = state_of(run).stage
    return stage.replies if stage else {}


def delivered(run: Path) -> set[str]:
    """Sites whose update of the open round is accepted."""
    return {site for site, reply in replies(run).items() if reply.artifact}


Alone = Callable[..., bytes]


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Alone:
    """The adapter that the healthy sites a and b alone give, for the flags of a run."""
    known: dict[tuple[str, ...], bytes] = {}

    def give(*flags: str) -> bytes:
        if flags not in known:
            federation = Federation(tmp_path_factory.mktemp("alone"), model)
            try:
                server = federation.server(*FLAGS, *flags)
                sites = healthy(federation)
                assert server.wait() == 0, server.text
                assert [site.wait() for site in sites] == [0, 0]
            finally:
                federation.stop()
            known[flags] = adapter_of(federation)
        return known[flags]

    return give


def all_end_well(server: Daemon, sites: list[Daemon]) -> None:
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0] * len(sites), "\n".join(site.text for site in sites)
    assert "Traceback" not in server.text


def test_a_coordinator_that_is_killed_goes_on_with_the_same_round_and_keeps_what_had_arrived(
    federation: Federation, alone: Alone
) -> None:
    listen, gate, run = f"127.0.0.1:{free_port()}", federation.folder / "gate", federation.folder / "run"
    flags = (*FLAGS, "--rounds=3", "--quorum=2")
    server = federation.server(*flags, listen=listen)
    (a,) = healthy(federation, names="a")
    with sabotaged(federation, WAITING.format(gate=str(gate))):
        (b,) = healthy(federation, names="b")
    until(lambda: delivered(run) == {"a"})
    update = replies(run)["a"].artifact
    assert update is not None
    server.kill()
    server = federation.server(*flags, listen=listen)
    assert "going on with run" in server.text
    state = state_of(run)
    assert (activity(state), state.round_number, delivered(run)) == ("training", 1, {"a"})
    assert (run / "artifacts" / update.digest).stat().st_size == update.size
    gate.touch()
    all_end_well(server, [a, b])
    assert adapter_of(federation) == alone("--rounds=3")
    # One upload for each of three rounds, and calls that are small beside it.
    assert 3 * update.size < received(federation, "a") < 3.7 * update.size
    assert a.text.count("round 1 trains on") == b.text.count("round 1 trains on") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(("--quorum=2", "--heartbeat-timeout=3"), "site c is lost", id="quorum"),
        pytest.param(
            ("--quorum=2", "--deadline=3", "--heartbeat-timeout=8"),
            "the deadline of 3 s is reached",
            id="deadline",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_round_closes_without_a_site_that_is_killed(
    federation: Federation, alone: Alone, flags: tuple[str, ...], words: str
) -> None:
    server = federation.server(*FLAGS, "--rounds=3", "--min-sites=3", *flags)
    sites = healthy(federation)
    with sabotaged(federation, WAITING.format(gate="/nowhere")):
        killed = federation.client("c", f"--data={shard(federation.folder, 'c')}")
    server.wait_for("round 1 of 3 opens with a, b, c")
    killed.kill()
    all_end_well(server, sites)
    assert server.text.index(words) < server.text.index("round 1 closed with 2 updates")
    assert [closed["contributors"] for closed in report_of(federation)["closed_rounds"]] == 3 * [["a", "b"]]
    assert adapter_of(federation) == alone("--rounds=3")


def test_a_site_that_starts_again_takes_over_at_once_and_another_key_is_refused(
    federation: Federation, alone: Alone
) -> None:
    folder = federation.folder
    federation.tls = folder / "certs"
    init_authority(federation.tls)
    issue(federation.tls, "coordinator", role=Role.COORDINATOR, hosts=("127.0.0.1",))
    for name in "ab":
        issue(federation.tls, name, role=Role.SITE)
    issue(federation.tls, "b", role=Role.SITE, out=folder / "thief")
    server = federation.server(*FLAGS, "--rounds=3", "--quorum=2", "--heartbeat-timeout=30")
    (a,) = healthy(federation, names="a")
    with sabotaged(federation, WAITING.format(gate="/nowhere")):
        (first,) = healthy(federation, names="b")
    server.wait_for("round 1 of 3 opens with a, b")
    thief = federation.client(
        "b",
        f"--data={folder / 'b.jsonl'}",
        f"--state={folder / 'thief-state'}",
        f"--tls-cert={folder / 'thief' / 'b.crt'}",
        f"--tls-key={folder / 'thief' / 'b.key'}",
    )
    assert thief.wait() == 1
    assert "another key" in thief.text
    assert first.process.poll() is None
    with sabotaged(federation, WAITING.format(gate=str(folder / "gate"))):
        successor = federation.client("b", f"--data={folder / 'b.jsonl'}", f"--state={folder / 'elsewhere'}")
    # It has the open task at once; the one that hangs hears of it with its next sign of life, and stops.
    successor.wait_for("round 1 trains on 8 of 8 rows")
    assert first.wait() == 1
    assert "taken over" in first.text
    (folder / "gate").touch()
    all_end_well(server, [a, successor])
    assert "is lost" not in server.text
    assert adapter_of(federation) == alone("--rounds=3")


def test_without_tls_a_name_in_use_is_refused_and_the_first_lives_on(federation: Federation) -> None:
    federation.server("--rounds=1", "--min-sites=2")
    (first,) = healthy(federation, names="a")
    first.wait_for("waiting for 1 more site")
    second = federation.client(
        "a", f"--data={federation.folder / 'a.jsonl'}", f"--state={federation.folder / 'elsewhere'}"
    )
    assert second.wait() == 1
    assert "another process is enrolled as 'a'" in second.text
    assert first.process.poll() is None


@pytest.mark.long
def test_a_site_that_is_killed_in_its_upload_goes_on_with_it_when_it_is_started_again(
    federation: Federation, alone: Alone
) -> None:
    artifacts = federation.folder / "run" / "artifacts"
    server = federation.server(*FLAGS, "--rounds=1", "--lora-rank=1024", "--quorum=2")
    (a,) = healthy(federation, names="a")
    with sabotaged(federation, HANGING_UPLOAD):
        (killed,) = healthy(federation, names="b")
    until(lambda: "round 1 trained" in killed.text and any(part.stat().st_size for part in artifacts.glob("*.part")))
    until(lambda: delivered(federation.folder / "run") == {"a"})
    killed.kill()
    (again,) = healthy(federation, names="b")
    all_end_well(server, [a, again])
    assert "the update of round 1 is already here" in again.text
    # All that b sent is its adapter once, and some calls.
    size = len(adapter_of(federation))
    assert size > 4_000_000
    assert received(federation, "b") < size + 2**18
    assert adapter_of(federation) == alone("--rounds=1", "--lora-rank=1024")


def test_a_site_that_crashes_in_training_says_so_without_the_librarys_words_and_the_round_goes_on(
    federation: Federation, alone: Alone
) -> None:
    server = federation.server(*FLAGS, "--rounds=3", "--min-sites=3")
    sites = healthy(federation)
    with sabotaged(federation, CRASHING):
        crashing = federation.client("c", f"--data={shard(federation.folder, 'c')}")
    all_end_well(server, sites)
    assert crashing.wait() == 1
    assert "every task of this site failed (3 of them); the run ended without it" in crashing.text
    assert "site c failed its train task: TaskError: the device ran out of memory in training" in server.text
    assert server.text.count("site c failed its train task: RuntimeError: the site's log has the details") == 2
    assert CANARY in crashing.text
    assert CANARY not in server.text
    for file in (federation.folder / "run").rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes()
    (site,) = [site for site in report_of(federation)["sites"] if site["site"] == "c"]
    assert (site["rejections"], site["last_error"]) == (0, "RuntimeError: the site's log has the details")
    assert adapter_of(federation) == alone("--rounds=3")


def ones(spec: TensorSpec) -> np.ndarray:
    return np.ones(spec.shape, dtype=np.float32)


def not_numbers(spec: TensorSpec) -> np.ndarray:
    return np.full(spec.shape, np.nan, dtype=np.float32)


def wider(manifest: AdapterManifest) -> AdapterManifest:
    first, *others = manifest.tensors
    return replace(manifest, tensors=(replace(first, shape=(first.shape[0] + 1, first.shape[1])), *others))


@pytest.mark.parametrize(
    ("forgery", "words"),
    [
        pytest.param(
            Forgery(ones, manifest=wider),
            "the update is rejected: base_model.model",
            id="wrong shape",
            marks=pytest.mark.long,
        ),
        pytest.param(Forgery(not_numbers), "holds values that are not finite", id="NaN"),
        pytest.param(
            Forgery(ones, samples=2**63),
            "claims 9223372036854775808 samples, the site was asked to train on at most 8 rows",
            id="samples",
            marks=pytest.mark.long,
        ),
        pytest.param(Forgery(ones, loss=1e308), "the training loss is 1e+308", id="loss", marks=pytest.mark.long),
    ],
)
def test_an_update_that_cannot_be_right_is_rejected_and_its_site_shut_out_in_the_end(
    federation: Federation, alone: Alone, forgery: Forgery, words: str
) -> None:
    # What failed is asked again after one heartbeat time-out.
    server = federation.server(*FLAGS, "--rounds=3", "--min-sites=3", "--heartbeat-timeout=20")
    sites = healthy(federation)
    hostile = Hostile(federation.folder / "run", federation.folder, "z", forgery)
    all_end_well(server, sites)
    hostile.finish()
    assert [answer.accepted for answer in hostile.answers] == [False] * 3
    assert all(words in answer.reason for answer in hostile.answers)
    assert server.text.count("site z failed its train task") == 2
    assert "site z is quarantined after 3 rejected results" in server.text
    assert [closed["contributors"] for closed in report_of(federation)["closed_rounds"]] == 3 * [["a", "b"]]
    assert adapter_of(federation) == alone("--rounds=3")


def test_whoever_declares_more_rows_than_there_can_be_is_refused(federation: Federation, alone: Alone) -> None:
    server = federation.server(*FLAGS, "--rounds=3", "--min-sites=2")
    (a,) = healthy(federation, names="a")
    with pytest.raises(grpc.RpcError) as caught:
        Hostile(federation.folder / "run", federation.folder, "z", Forgery(ones), rows=10**12)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "declares 1000000000000 rows" in caught.value.details()
    (b,) = healthy(federation, names="b")
    all_end_well(server, [a, b])
    assert adapter_of(federation) == alone("--rounds=3")


def test_a_site_with_a_hundred_million_rows_has_its_largest_share_and_no_more(
    federation: Federation, alone: Alone
) -> None:
    many = 10**8
    run = federation.folder / "run"
    server = federation.server(
        *FLAGS,
        "--rounds=1",
        "--min-sites=3",
        "--max-weight-share=0.4",
        "--max-rows-per-site=100000000",
        # Else so large an update would be left out.
        "--update-norm-factor=0",
    )
    sites = healthy(federation)
    hostile = Hostile(run, federation.folder, "z", Forgery(ones, samples=many), rows=many)
    all_end_well(server, sites)
    hostile.finish()
    assert hostile.answers[0].accepted
    manifest = state_of(run).adapter_manifest
    expected = federation.folder / "alone.safetensors"
    expected.write_bytes(alone("--rounds=1"))
    path = run / "checkpoint" / "adapter_model.safetensors"
    with AdapterReader(path, manifest) as found, AdapterReader(expected, manifest) as honest:
        for spec in manifest.tensors:
            np.testing.assert_allclose(found.tensor(spec), 0.6 * honest.tensor(spec) + 0.4, rtol=1e-6)


def test_bytes_that_are_no_message_are_refused_and_change_nothing(federation: Federation, alone: Alone) -> None:
    server = federation.server(*FLAGS, "--rounds=3")
    (a,) = healthy(federation, names="a")
    with grpc.insecure_channel(federation.address()) as channel:
        for method in ("Federation/Enroll", "Federation/NextTask", "Federation/CompleteTask", "Operations/Stop"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/fedhds.v2.{method}")(b"\xff\xfe\xfd", timeout=30)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "the bytes of a request are no message of this method"
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary("/fedhds.v2.Federation/Upload")(iter([b"\xff\xfe\xfd"]), timeout=30)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    (b,) = healthy(federation, names="b")
    all_end_well(server, [a, b])
    assert adapter_of(federation) == alone("--rounds=3")
