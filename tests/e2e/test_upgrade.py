"""What an earlier version wrote: a run of this format goes on where it was; older ones are refused and left alone."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedhds import __version__
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.run.state import ClosedRound, unpacked
from tests.support import earlier
from tests.support.federation import Daemon, Federation
from tests.support.pair import ROUNDS, Pair, closed
from tests.support.postgres import PostgresServer
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

# The last version whose runs this one goes on with, and the last one of format 1 and protocol 1 that left a run.
LAST = "0.3.0.dev0"
OLD = "0.1.0"
REFUSED = "format 1, which version 0.2 of fedhds wrote"
MOMENTUM = 0.9


@contextmanager
def code_of(version: str) -> Iterator[dict[str, str]]:
    """In which console scripts run the code of another version; skips where there is no tag of it."""
    tag = f"v{version}"
    if version == __version__ or not earlier.has_tag(tag):
        pytest.skip(f"this clone has no tag {tag} of another version, whose code would run here; git fetch --tags")
    with earlier.code_of(tag) as environment:
        yield environment


@pytest.fixture
def last() -> Iterator[dict[str, str]]:
    """The environment of the last version."""
    with code_of(LAST) as environment:
        yield environment


@pytest.fixture
def old() -> Iterator[dict[str, str]]:
    """The environment of a version that speaks protocol 1."""
    with code_of(OLD) as environment:
        yield environment


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by their names without what PEFT puts before them."""
    from safetensors.numpy import load_file

    return {name.removeprefix("base_model.model."): values for name, values in load_file(path).items()}


def mean_update(folder: Path, round_number: int) -> dict[str, np.ndarray]:
    """The mean of both sites' updates: no site has more than half of the weight, so both have half."""
    updates = folder / "run" / "artifacts" / "updates" / f"round-{round_number}"
    one, other = (tensors(updates / f"{name}.safetensors") for name in earlier.SITES)
    return {name: (one[name] + other[name]) / 2 for name in one}


def check_that_it_goes_on(folder: Path, scratch: Path) -> None:
    """Ends the run in `folder` with this version's daemons; nothing that the earlier one had accepted is done again."""
    before, told = earlier.looked_at(folder, scratch)
    stage, artifacts = before["stage"], folder / "run" / "artifacts"
    assert (before["phase"], before["round_number"], stage["kind"], list(stage["replies"])) == (
        "running",
        2,
        "train",
        ["a"],
    )
    assert [task["site"] for task in before["tasks"].values() if task["kind"] == "train"] == ["b"]
    accepted = stage["replies"]["a"]
    accepted_bytes = (artifacts / accepted["artifact"]["digest"]).read_bytes()
    (part,) = artifacts.glob("*.part")
    assert 0 < part.stat().st_size < len(accepted_bytes)
    # Of the server optimizer, after round 1.
    moved = tensors(artifacts / before["slots"]["momentum"]["digest"])

    federation = Federation(folder, earlier.MODEL)
    try:
        server = federation.server(*earlier.COORDINATOR, "--keep-updates")
        server.wait_for(f"going on with run {before['run_id']}")
        sites = {
            name: federation.start(name, "fedhds-client", *earlier.client_flags(federation, name))
            for name in earlier.SITES
        }
        for daemon in (server, *sites.values()):
            assert daemon.wait() == 0, server.text + daemon.text
    finally:
        federation.stop()

    for site in sites.values():
        assert "round 1 trains" not in site.text
        # Site a's update was accepted; site b's was finished and half uploaded.
        assert "round 2 trains" not in site.text
        assert "round 3 trains" in site.text
    lines = earlier.journal(folder)
    assert lines[: len(told)] == told
    assert [sum(line.startswith(f"round {number} closed") for line in lines) for number in (1, 2, 3)] == [1, 1, 1]
    ended = earlier.state(folder)
    rounds = ended["closed_rounds"]
    # What the earlier version did not know of its round has its default.
    assert ClosedRound.model_validate(rounds[0]) == ClosedRound.model_validate(before["closed_rounds"][0])
    assert rounds[1]["contributions"]["a"] == unpacked(accepted["message"], pb.TrainResult).samples
    assert [set(entry["contributions"]) for entry in rounds] == [{"a", "b"}] * 3
    assert list(ended["evaluations"]) == ["0", "1", "2", "3"]

    assert (artifacts / "updates" / "round-2" / "a.safetensors").read_bytes() == accepted_bytes
    checkpoint = folder / "run" / "checkpoint" / "adapter_model.safetensors"
    for name in earlier.SITES:
        assert (folder / "out" / name / "adapter_model.safetensors").read_bytes() == checkpoint.read_bytes()
    # The server's momentum of round 1 is in what it made of the updates of rounds 2 and 3.
    adapter = tensors(artifacts / ended["adapters"]["1"]["digest"])
    assert any(values.any() for name, values in moved.items() if "lora_B" in name)
    for number in (2, 3):
        mean = mean_update(folder, number)
        moved = {name: MOMENTUM * moved[name] + mean[name] - adapter[name] for name in adapter}
        adapter = {name: adapter[name] + moved[name] for name in adapter}
    for name, values in tensors(checkpoint).items():
        np.testing.assert_allclose(values, adapter[name], rtol=1e-5, atol=1e-6)


def test_a_run_that_the_last_version_left_in_mid_round_goes_on(tmp_path: Path) -> None:
    check_that_it_goes_on(earlier.unpacked_run(LAST, tmp_path / "run-of-before"), tmp_path / "copy")


@pytest.mark.parametrize("version", [pytest.param(earlier.WORK_TREE, marks=pytest.mark.long), LAST])
def test_a_run_that_a_version_leaves_in_mid_round_now_goes_on(tmp_path: Path, version: str) -> None:
    """What `make upgrade-fixture` packs, also of the version that is being written."""
    folder = tmp_path / "run-of-before"
    folder.mkdir()
    with earlier.code_of(version) if version == earlier.WORK_TREE else code_of(version) as environment:
        earlier.interrupt(folder, environment)
    check_that_it_goes_on(folder, tmp_path / "copy")


@pytest.mark.parametrize("older", ["server", "site a"])
def test_the_last_version_and_this_one_work_together(federation: Federation, last: dict[str, str], older: str) -> None:
    federation.environment = last if older == "server" else {}
    server = federation.server(
        "--rounds=2", "--selection-strategy=fedhds-aligned", "--selection-budget=6", "--reduction=pca"
    )
    sites = []
    for name in "ab":
        federation.environment = last if older == f"site {name}" else {}
        path = write_rows(federation.folder / f"{name}.jsonl", {name: 7, "sea": 5})
        sites.append(federation.client(name, f"--data={path}"))
    for daemon in (server, *sites):
        assert daemon.wait() == 0, daemon.text
    assert f"fedhds-server {LAST if older == 'server' else __version__} listens" in server.text
    assert server.text.count("closed with 2 updates") == 2
    final = federation.folder / "run" / "checkpoint" / "adapter_model.safetensors"
    for name in "ab":
        assert (federation.folder / "out" / name / "adapter_model.safetensors").read_bytes() == final.read_bytes()


def test_a_standby_of_this_version_takes_over_from_a_leader_of_the_last_one(
    federation: Federation, last: dict[str, str], postgres: PostgresServer
) -> None:
    """The rolling upgrade of docs/operations.md."""
    pair = Pair(federation, postgres)
    now = dict(federation.environment)
    federation.environment = now | last
    first = pair.server("one")
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    second.process.send_signal(signal.SIGTERM)
    second.wait()
    federation.environment = now
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    federation.environment = now | last
    sites = [pair.client(name) for name in "ab"]
    federation.environment = now
    first.wait_for("round 2 closed")
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    second.wait_for("going on with run")
    again = pair.server("one")
    for daemon in (second, again, *sites):
        assert daemon.wait() == 0, daemon.text
    assert f"fedhds-server {LAST} listens" in first.text
    assert f"fedhds-server {__version__} listens" in second.text
    assert closed(pair.journal()) == ROUNDS


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of the database what is in it, as opening it moves its log."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("run.db"):
            files[str(path.relative_to(folder))] = path.read_bytes()
    with closing(sqlite3.connect(f"file:{folder / 'run' / 'run.db'}?mode=ro", uri=True)) as database:
        files["run.db"] = "\n".join(database.iterdump()).encode()
    return files


def test_a_run_of_format_1_is_refused_naming_the_version_that_opens_it_and_left_as_it_is(tmp_path: Path) -> None:
    folder = earlier.unpacked_run(OLD, tmp_path / "run-of-before")
    before = contents(folder)
    assert b'INSERT INTO "run" VALUES(1,1,' in before["run.db"]
    federation = Federation(folder, earlier.MODEL)
    server = federation.start("server", "fedhds-server", *federation.server_flags(*earlier.COORDINATOR))
    assert server.wait() == 1, server.text
    assert REFUSED in server.text
    assert "finish it with version 0.2, or start a new run elsewhere" in server.text
    assert "Traceback" not in server.text
    server.log.unlink()
    assert contents(folder) == before


def refused_site(site: Daemon, target: str) -> None:
    """A site of this version says at once what is wrong with the coordinator, and what to install."""
    began = time.monotonic()
    assert site.wait() == 1, site.text
    # Its reconnect time-out is five minutes.
    assert time.monotonic() - began < 60
    assert f"the coordinator at {target} does not know protocol 2 of fedhds {__version__}" in site.text
    assert f"install fedhds {__version__} there, or here the version that runs there" in site.text
    assert site.text.endswith("[FH20]\n")
    assert "Traceback" not in site.text


def test_a_site_of_protocol_1_is_told_what_to_install(federation: Federation) -> None:
    federation.server("--rounds=1")
    with grpc.insecure_channel(federation.address()) as channel:
        for method in ("Federation/Enroll", "Operations/GetStatus"):
            with pytest.raises(grpc.RpcError) as refused:
                # As its stubs call: the site's name in field 1.
                channel.unary_unary(f"/fedhds.v1.{method}")(b"\x0a\x01a", timeout=30)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert f"install fedhds {__version__} here" in refused.value.details()
            assert ("fedhds-error", "EnrolmentRefused") in refused.value.trailing_metadata()


def test_a_site_and_an_operator_are_told_that_a_coordinator_is_older(federation: Federation) -> None:
    """Of protocol 1 it knows the calls, which is all that matters here; every other one is UNIMPLEMENTED."""

    server = grpc.server(ThreadPoolExecutor(1))
    calls = {"Enroll": grpc.unary_unary_rpc_method_handler(lambda request, context: b"")}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fedhds.v1.Federation", calls),))
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        path = write_rows(federation.folder / "a.jsonl", {"sun": 4})
        refused_site(federation.client("a", f"--data={path}", server=target), target)
        status = federation.start("status", "fedhds", "status", f"--server={target}")
        assert status.wait() == 1
        assert f"fedhds: the coordinator at {target} does not know protocol 2" in status.text
    finally:
        server.stop(None)


def test_a_site_of_the_old_version_and_this_coordinator(federation: Federation, old: dict[str, str]) -> None:
    federation.server("--rounds=1")
    federation.environment = old
    path = write_rows(federation.folder / "a.jsonl", {"sun": 4})
    site = federation.client("a", f"--data={path}")
    assert site.wait() == 1, site.text
    assert f"install fedhds {__version__} here" in site.text
    assert "Traceback" not in site.text


def test_a_coordinator_of_the_old_version_and_this_site(federation: Federation, old: dict[str, str]) -> None:
    federation.environment = old
    federation.server("--rounds=1")
    federation.environment = {}
    path = write_rows(federation.folder / "a.jsonl", {"sun": 4})
    refused_site(federation.client("a", f"--data={path}"), federation.address())


def test_a_standby_of_this_version_is_refused_by_a_database_of_the_old_one(
    federation: Federation, old: dict[str, str], postgres: PostgresServer
) -> None:
    federation.environment = old | {"FEDHDS_STORE": postgres.create_database()}
    leader = federation.server("--rounds=1", "--min-sites=1", run="one")
    federation.environment.pop("PYTHONPATH")
    standby = federation.start("two", "fedhds-server", *federation.server_flags("--rounds=1", run="two"))
    assert standby.wait() == 1, standby.text
    assert REFUSED in standby.text
    # The leader has not noticed anything.
    federation.environment = old
    path = write_rows(federation.folder / "a.jsonl", {"sun": 4})
    site = federation.client("a", f"--data={path}", server=federation.address("one"))
    assert (leader.wait(), site.wait()) == (0, 0), leader.text + site.text


@pytest.mark.parametrize("version", [LAST, OLD])
def test_the_fixtures_are_small(version: str) -> None:
    assert earlier.archive_of(version).stat().st_size < 200_000
