"""Runs docs/two-hosts.md and docs/operations.md: what a reader is told to do does what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fedhds_server.storage.sql import SqlStore
from tests.support.hosts import Hosts, steps
from tests.support.pages import blocks
from tests.support.postgres import PostgresServer
from tests.support.s3 import s3_server
from tests.support.tiny import make_model, write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

GUIDE, OPERATIONS = "docs/two-hosts.md", "docs/operations.md"
SERVER, CLIENT = "fedhds-server", "fedhds-client"
SITES = ("hospital-a", "hospital-b")
# Enough for all that happens in mid-run; and no round is to close without a site that is being started again.
ROUNDS = 120
LONGER = {"rounds: 20": f"rounds: {ROUNDS}\nquorum: 100%"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@contextmanager
def federation(folder: Path, model: Path, replaced: dict[str, str] | None = None) -> Iterator[Hosts]:
    """Hosts on which the guide has been followed up to the point at which everything runs."""
    hosts = Hosts(folder, {"meta-llama/Llama-3.2-1B-Instruct": str(model), **LONGER, **(replaced or {})})
    try:
        hosts.follow("authority", steps(GUIDE, "authority"))
        for party in ("coordinator", *SITES, "alice"):
            hosts.hand_over(f"for-{party}", party)
        hosts.follow("coordinator", steps(GUIDE, "coordinator"))
        hosts.wait_for("coordinator", SERVER, "listens on .*mutual TLS")
        for number, site in enumerate(SITES):
            write_rows(hosts.home(site) / "shard.jsonl", {"sun": 100, "sea": 60, "moon": 40 * number})
            printed = hosts.follow(site, steps(GUIDE, "hospital-a"), {"hospital-a": site})
            assert "enrolling" in printed
        yield hosts
    finally:
        hosts.close()


def final_adapter(hosts: Hosts) -> bytes:
    """The adapter that everybody has when all services have ended."""
    for host, unit in (("coordinator", SERVER), *((site, CLIENT) for site in SITES)):
        hosts.wait_for_end(host, unit)
        assert "Traceback" not in hosts.log(host, unit)
    listed = hosts.follow("coordinator", steps(GUIDE, "coordinator", "result"))
    folders = [hosts.root("coordinator") / "var/lib/fedhds/run/checkpoint"]
    for site in SITES:
        listed += hosts.follow(site, steps(GUIDE, "hospital-a", "result"), {"hospital-a": site})
        folders.append(hosts.root(site) / "var/lib/fedhds/adapter")
    assert listed.count("adapter_model.safetensors") == 3
    (adapter,) = {(folder / "adapter_model.safetensors").read_bytes() for folder in folders}
    return adapter


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> bytes:
    """The adapter of a run in which the guide is followed and nothing else happens."""
    with federation(tmp_path_factory.mktemp("guide"), model) as hosts:
        hosts.wait_for("coordinator", SERVER, "round 1 closed")
        watched = hosts.follow("alice", steps(GUIDE, "alice"))
        assert all(site in watched for site in SITES)
        adapter = final_adapter(hosts)
        for host in ("coordinator", *SITES, "alice"):
            keys = {path.name for path in hosts.root(host).rglob("*.key")}
            assert keys == {f"{host}.key"}
            assert not [path for path in hosts.root(host).rglob("*.key") if path.stat().st_mode & 0o077]
        return adapter


@pytest.mark.long
def test_the_guide_leads_to_an_adapter(undisturbed: bytes) -> None:
    assert undisturbed


def test_units_are_such_as_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    units = [block for block in blocks(GUIDE) if block.language == "ini"]
    assert len(units) == 2
    for block in units:
        path = tmp_path / Path(block.marks["file"]).name
        # The program is not installed there.
        path.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", block.text))
        judged = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
        complaints = [line for line in judged.stderr.splitlines() if path.name in line]
        assert not complaints


@pytest.mark.long
def test_a_renewed_certificate_is_taken_by_a_restart_and_a_backup_from_before_restores_the_run(
    tmp_path: Path, model: Path, undisturbed: bytes
) -> None:
    with federation(tmp_path, model) as hosts:
        hosts.wait_for("coordinator", SERVER, "round 2 closed")
        hosts.follow("coordinator", steps(OPERATIONS, "coordinator", "look"))
        (hosts.home("coordinator") / "state.db").rename(tmp_path / "run.db")
        with closing(SqlStore.in_folder(tmp_path)) as copy:
            state = copy.load()
            assert state
            assert len(state.closed_rounds) >= 2
        hosts.follow("coordinator", steps(OPERATIONS, "coordinator", "backup"))
        kept = hosts.log("coordinator", SERVER).count(" closed with ")

        certificate, key = (hosts.root("hospital-a") / f"etc/fedhds/hospital-a.{kind}" for kind in ("crt", "key"))
        before = certificate.read_bytes(), key.read_bytes()
        hosts.follow("authority", steps(OPERATIONS, "authority", "renew"))
        hosts.hand_over("for-hospital-a/hospital-a.crt", "hospital-a")
        hosts.follow("hospital-a", steps(OPERATIONS, "hospital-a", "renew"))
        assert (certificate.read_bytes() == before[0], key.read_bytes() == before[1]) == (False, True)
        hosts.wait_for("hospital-a", CLIENT, "enrolled in run", 2)
        hosts.wait_for("coordinator", SERVER, f"round {kept + 2} closed")

        hosts.cut_power("coordinator", SERVER)
        assert "the run is complete" not in hosts.log("coordinator", SERVER)
        shutil.rmtree(hosts.root("coordinator") / "var/lib/fedhds/run")
        hosts.follow("coordinator", steps(OPERATIONS, "coordinator", "restore"))
        assert final_adapter(hosts) == undisturbed
        # It had enrolled after the backup; systemd started it again.
        assert "the session is unknown" in hosts.log("hospital-a", CLIENT)
        assert "the session is unknown" not in hosts.log("hospital-b", CLIENT)
        closed = [int(number) for number in re.findall(r"round (\d+) closed", hosts.log("coordinator", SERVER))]
        # Up to the power cut, then from the backup on, each once.
        assert closed[-ROUNDS + kept :] == list(range(kept + 1, ROUNDS + 1))
        assert len(closed) > ROUNDS


@pytest.mark.long
def test_a_run_moves_to_postgresql_and_s3_and_a_dump_restores_it(
    tmp_path: Path, model: Path, undisturbed: bytes, postgres: PostgresServer
) -> None:
    hosts_folder = tmp_path / "hosts"
    hosts_folder.mkdir()
    with s3_server(tmp_path) as bucket, federation(hosts_folder, model, {"s3://fedhds/adapters": bucket.url}) as hosts:
        root = hosts.root("coordinator")
        secrets = root / "etc/fedhds/server.env"

        def use(url: str) -> None:
            values = {"FEDHDS_STORE": url, **bucket.environment}
            secrets.write_text("".join(f"{key}='{value}'\n" for key, value in values.items()))

        def do(step: str, replaced: dict[str, str] | None = None) -> str:
            """Follows a step in mid-run and waits until the run has gone on for a round."""
            lives = hosts.log("coordinator", SERVER).count("going on with run")
            printed = hosts.follow("coordinator", steps(OPERATIONS, "coordinator", step), replaced)
            again = "going on with run.*" * (lives + 1)
            hosts.wait_for("coordinator", SERVER, rf"(?s){again}round \d+ closed")
            assert "the run is complete" not in hosts.log("coordinator", SERVER), f"over too early for {step}"
            return printed

        hosts.wait_for("coordinator", SERVER, "round 2 closed")
        use(postgres.create_database())
        assert "moved the run" in do("to-postgresql")
        do("dump")
        use(postgres.create_database())
        do("restore-dump")
        run_id = re.findall(r"run (\w+) begins", hosts.log("coordinator", SERVER))[0]
        assert "copied" in do("to-s3", {"0123456789abcdef": run_id})
        assert final_adapter(hosts) == undisturbed
        assert not (root / "var/lib/fedhds/run/artifacts").exists()
        assert not (root / "var/lib/fedhds/run/run.db").exists()
