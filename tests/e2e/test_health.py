"""Liveness and readiness of real processes: a full disk, an absent database, foreign tables, a stall."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedhds.runtime.liveness import STALLED_S
from fedhds_server.leadership.readiness import DISK_RESERVE
from tests.support.federation import Daemon, Federation, file_system
from tests.support.postgres import PostgresServer
from tests.support.scrapes import FLAG, get, scrape, until
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e


def grpc_health(address: str, service: str = "") -> str:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def ready(daemon: Daemon) -> bool:
    return get(daemon, "/readyz") == (200, "ready\n")


@pytest.fixture
def mount(federation: Federation) -> Iterator[Path]:
    """Room for the reserve, and 8 MiB."""
    with file_system(federation, (DISK_RESERVE >> 20) + 8) as folder:
        yield folder


def test_a_coordinator_whose_disk_is_nearly_full_is_not_ready(federation: Federation, mount: Path) -> None:
    server = federation.server("--rounds=1", FLAG, run="small/run")
    until(lambda: ready(server))
    filler = mount / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(mount).free - DISK_RESERVE + (64 << 10)))
    until(lambda: not ready(server))
    status, text = get(server, "/readyz")
    assert (status, text.startswith(f"disk: {mount}")) == (503, True), text
    for service in ("", "fedhds.v2.Federation"):
        assert grpc_health(federation.address("small/run"), service) == "NOT_SERVING"
    # It lives, and that it does not lead is no reason.
    assert grpc_health(federation.address("small/run"), "grpc.health.v1.Health") == "SERVING"
    assert get(server, "/healthz")[0] == 200
    seen = scrape(server)
    assert (seen("fedhds_ready"), seen("fedhds_leading")) == (0, 1)
    assert seen("fedhds_not_ready", problem="disk") == 1
    assert seen("fedhds_disk_free_bytes") < seen("fedhds_disk_needed_bytes") == DISK_RESERVE
    server.wait_for("not ready: ")
    filler.unlink()
    until(lambda: ready(server))
    assert grpc_health(federation.address("small/run")) == "SERVING"


def test_a_coordinator_without_its_database_is_alive_and_not_ready(
    federation: Federation, postgres: PostgresServer
) -> None:
    federation.environment["FEDHDS_STORE"] = postgres.create_database()
    server = federation.server("--rounds=1", FLAG)
    until(lambda: ready(server))
    postgres.stop()
    try:
        until(lambda: "store: " in get(server, "/readyz")[1])
        assert get(server, "/readyz")[0] == 503
        assert grpc_health(federation.address()) == "NOT_SERVING"
        assert get(server, "/healthz")[0] == 200
        assert scrape(server)("fedhds_not_ready", problem="store") == 1
    finally:
        postgres.start()
    until(lambda: ready(server))
    assert grpc_health(federation.address()) == "SERVING"


def test_a_database_with_tables_of_another_version_makes_not_ready(federation: Federation) -> None:
    server = federation.server("--rounds=1", FLAG)
    until(lambda: ready(server))

    def mark(revision: str) -> str:
        with closing(sqlite3.connect(federation.folder / "run" / "run.db", timeout=20)) as database, database:
            (before,) = database.execute("select version_num from alembic_version").fetchone()
            database.execute("update alembic_version set version_num = ?", (revision,))
        return str(before)

    current = mark("0001")
    until(lambda: get(server, "/readyz")[1].startswith("migrations: "))
    assert grpc_health(federation.address()) == "NOT_SERVING"
    mark(current)
    until(lambda: ready(server))


@pytest.mark.long
def test_liveness_follows_the_event_loop(federation: Federation) -> None:
    """The process is made to stand still in its main thread, where the event loop runs."""
    stall_s = STALLED_S + 2
    code = f"import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep({stall_s}))\n"
    (federation.folder / "sitecustomize.py").write_text(code)
    federation.environment["PYTHONPATH"] = f"{federation.folder}:{os.environ.get('PYTHONPATH', '')}"
    server = federation.server("--rounds=1", FLAG)
    assert get(server, "/healthz") == (200, "alive\n")
    began = time.monotonic()
    server.process.send_signal(signal.SIGUSR1)
    # The signal may come a moment after a probe that is still answered.
    answered = 0.0
    while time.monotonic() < began + stall_s - 3:
        with contextlib.suppress(TimeoutError):
            get(server, "/healthz", timeout_s=2)
            answered = time.monotonic()
    assert answered < began + 2
    server.wait_for("most recent call first")
    assert "sitecustomize.py" in server.text
    assert get(server, "/healthz") == (200, "alive\n")
    until(lambda: scrape(server)("fedhds_event_loop_lag_seconds_count") > 0)
    seen = scrape(server)
    slow = seen("fedhds_event_loop_lag_seconds_count") - seen("fedhds_event_loop_lag_seconds_bucket", le="5.0")
    assert slow == 1
    assert server.process.poll() is None


def test_a_run_that_waits_for_its_quorum_says_so_with_a_metric(federation: Federation) -> None:
    flags = ("--rounds=400", "--selection-strategy=full", "--min-sites=2", "--quorum=2", "--heartbeat-timeout=3")
    server = federation.server(*flags, FLAG)
    paths = {name: write_rows(federation.folder / f"{name}.jsonl", {"sun": 8}) for name in "ab"}
    sites = [federation.client(name, f"--data={path}", FLAG) for name, path in paths.items()]
    server.wait_for("round 1 closed")
    assert scrape(server)("fedhds_short_of_quorum_seconds") == 0
    sites[1].kill()
    server.wait_for("waits for its quorum")
    until(lambda: scrape(server)("fedhds_short_of_quorum_seconds") > 1)
    seen = scrape(server)
    assert seen("fedhds_since_progress_seconds") > 0
    assert seen("fedhds_sites", state="lost") == seen("fedhds_cohort_progress_sites", state="disconnected") == 1
    assert (seen("fedhds_cohort_quorum"), seen("fedhds_cohort_progress_sites", state="answered")) == (2, 1)
    federation.client("b", f"--data={paths['b']}")
    until(lambda: scrape(server)("fedhds_short_of_quorum_seconds") == 0)
    assert scrape(server)("fedhds_sites", state="lost") == 0
    # A client that its coordinator has left says so as well, and is not ready.
    until(lambda: ready(sites[0]))
    server.kill()
    until(lambda: scrape(sites[0])("fedhds_client_connected") == 0)
    status, text = get(sites[0], "/readyz")
    assert (status, text.startswith("link: ")) == (503, True)
    assert get(sites[0], "/healthz")[0] == 200


def test_an_occupied_or_open_http_port_is_refused(federation: Federation) -> None:
    federation.server("--rounds=1", run="one")
    for flag, words in (
        (f"--http={federation.address('one')}", "--http: cannot listen on"),
        ("--http=0.0.0.0:0", "--insecure"),
        ("--http=9470", "not HOST:PORT"),
    ):
        second = federation.start("two", "fedhds-server", *federation.server_flags("--rounds=1", flag, run="two"))
        assert second.wait() == 2
        assert words in second.text
        assert "Traceback" not in second.text
