"""Two coordinators on one PostgreSQL and one folder of artifacts: one leads, the other takes over."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedhds.cli.checks import State, coordinator
from fedhds.errors import NotLeading
from fedhds.grpc_errors import error_of
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from fedhds_server.leadership.leadership import LEASE_S
from tests.support import programs
from tests.support.federation import Daemon, Federation
from tests.support.pair import ROUNDS, Pair, closed
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

# Besides the lease: a poll, and a machine that others use too.
SLACK_S = 5.0


@pytest.fixture
def pair(federation: Federation, postgres: PostgresServer) -> Iterator[Pair]:
    yield Pair(federation, postgres)
    federation.stop()
    for daemon in federation.daemons:
        assert PASSWORD not in daemon.text
        assert "Traceback" not in daemon.text


def seconds_until(daemon: Daemon, words: str, since: float) -> float:
    daemon.wait_for(words)
    return time.monotonic() - since


def test_a_standby_takes_over_from_a_leader_that_is_killed_and_the_adapter_is_the_same(
    federation: Federation, postgres: PostgresServer
) -> None:
    plain = federation.server("--rounds=6", "--selection-strategy=full", "--min-sites=2", run="plain")
    for name in "ab":
        path = write_rows(federation.folder / f"{name}.jsonl", {"sun": 10})
        federation.client(name, f"--data={path}", server=federation.address("plain"))
    assert plain.wait() == 0, plain.text
    for daemon in federation.daemons:
        daemon.wait()
    for name in "ab":
        # The same sites, in another run.
        (federation.folder / "state" / name).rename(federation.folder / f"state-{name}")

    pair = Pair(federation, postgres)
    first = pair.server("one")
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    sites = [pair.client(name) for name in "ab"]
    first.wait_for("round 2 closed")
    first.kill()
    taken_s = seconds_until(second, "going on with run", time.monotonic())
    print(f"taken over after {taken_s:.1f} s")
    assert taken_s < LEASE_S + SLACK_S
    assert second.wait() == 0, second.text
    assert [site.wait() for site in sites] == [0, 0], "\n".join(site.text for site in sites)
    assert closed(pair.journal()) == ROUNDS
    results = [
        (federation.folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes() for run in ("plain", "two")
    ]
    assert results[0] == results[1]
    assert PASSWORD not in "".join(daemon.text for daemon in federation.daemons)


@pytest.mark.long
def test_a_standby_is_not_ready_and_takes_over_at_once_from_a_leader_that_is_stopped(pair: Pair) -> None:
    first = pair.server("one")
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    federation = pair.federation
    assert health(federation.address("one")) == "SERVING"
    assert health(federation.address("two")) == "NOT_SERVING"
    assert health(federation.address("two"), "fedhds.v2.Federation") == "NOT_SERVING"
    assert health(federation.address("two"), "grpc.health.v1.Health") == "SERVING"
    with grpc.insecure_channel(federation.address("two")) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            rpc.FederationStub(channel).Enroll(pb.EnrollRequest(site="a", protocol_versions=[2]), timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert isinstance(error_of(refused.value), NotLeading)
    (seen,) = coordinator(federation.address("two"), None)
    assert (seen.state, seen.message) == (State.OK, "is reached and stands by")
    both = f"{federation.address('two')},{federation.address('one')}"
    asked = programs.run("fedhds", "status", "--json", "--server", both)
    assert json.loads(asked.stdout)["phase"] == "enrolling"
    alone = programs.run("fedhds", "status", "--json", "--server", federation.address("two"))
    assert alone.returncode == 1
    assert "stands by" in alone.stderr

    sites = [pair.client(name) for name in "ab"]
    first.wait_for("round 2 closed")
    first.process.send_signal(signal.SIGTERM)
    taken_s = seconds_until(second, "going on with run", time.monotonic())
    print(f"taken over after {taken_s:.1f} s")
    assert taken_s < LEASE_S - 1.0
    assert first.wait() == 128 + signal.SIGTERM
    assert second.wait() == 0, second.text
    assert [site.wait() for site in sites] == [0, 0], "\n".join(site.text for site in sites)
    assert closed(pair.journal()) == ROUNDS


@pytest.mark.long
def test_a_leader_that_stood_still_cannot_write_and_stands_by(pair: Pair) -> None:
    first = pair.server("one")
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    sites = [pair.client(name) for name in "ab"]
    first.wait_for("round 2 closed")
    first.process.send_signal(signal.SIGSTOP)
    seen = first.text
    taken_s = seconds_until(second, "going on with run", time.monotonic())
    print(f"taken over after {taken_s:.1f} s")
    assert taken_s < LEASE_S + SLACK_S
    first.process.send_signal(signal.SIGCONT)
    first.wait_for("standing by [FH53]\n")
    assert "this coordinator does not lead the run (any more)" in first.text
    assert second.wait() == 0, second.text
    # It takes over the run that is over, for sites that might still come, and ends with it.
    assert first.wait() == 0, first.text
    assert [site.wait() for site in sites] == [0, 0], "\n".join(site.text for site in sites)
    # What it did between waking up and noticing has left no trace.
    assert closed(pair.journal()) == ROUNDS
    after = first.text[len(seen) :].partition("standing by [FH53]\n")[0]
    assert not re.search(r"round \d+ (closed|of)", after), after


def test_a_leader_that_is_started_again_need_not_wait_for_its_own_lease(pair: Pair) -> None:
    first = pair.server("one")
    first.wait_for(" begins")
    first.kill()
    again = pair.server("one")
    again.wait_for("going on with run")
    assert "standing by" not in again.text


@pytest.mark.long
def test_a_copy_of_a_run_folder_stands_by_for_the_original(pair: Pair) -> None:
    pair.server("one").wait_for(" begins")
    pair.federation.stop()
    shutil.copytree(pair.federation.folder / "one", pair.federation.folder / "two", symlinks=True)
    first = pair.server("one")
    first.wait_for("going on with run")
    second = pair.server("two")
    second.wait_for("standing by")
    time.sleep(2 * LEASE_S)
    # Neither took the lead from the other.
    assert "going on with run" not in second.text
    assert "does not lead" not in first.text
    first.kill()
    second.wait_for("going on with run")


@pytest.mark.long
def test_a_database_that_is_away_for_longer_than_the_lease_is_waited_for(pair: Pair) -> None:
    first = pair.server("one")
    second = pair.server("two")
    sites = [pair.client(name) for name in "ab"]
    first.wait_for("round 2 closed")
    pair.postgres.stop()
    try:
        first.wait_for("the lease could not be renewed")
        second.wait_for("trying again")
    finally:
        pair.postgres.start()
    statuses = {first.wait(), second.wait()}
    assert statuses == {0}, first.text + second.text
    assert [site.wait() for site in sites] == [0, 0], "\n".join(site.text for site in sites)
    assert closed(pair.journal()) == ROUNDS


def test_a_standby_of_another_run_is_refused_when_it_starts(pair: Pair) -> None:
    pair.server("one").wait_for("listens on")
    other = pair.federation.start(
        "server", "fedhds-server", *pair.federation.server_flags("--rounds=5", "--selection-strategy=full", run="two")
    )
    assert other.wait() == 2
    assert "--store: the database contains a run with other settings (--rounds 6, now 5" in other.text


def test_a_database_that_does_not_answer_is_said(pair: Pair) -> None:
    pair.federation.environment["FEDHDS_STORE"] = pair.store.replace("/test", "/absent")
    server = pair.federation.start("server", "fedhds-server", *pair.federation.server_flags("--rounds=1"))
    assert server.wait() == 1
    assert 'database "absent' in server.text


def health(address: str, service: str = "") -> str:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
