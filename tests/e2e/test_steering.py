"""The operator's commands against real daemons: who may give them, what they do, and that the reasons are kept."""

from __future__ import annotations

import subprocess

import pytest

from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from tests.support import programs
from tests.support.federation import Daemon, Federation, free_port
from tests.support.hostile import state_of, until
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

# More rounds than any test waits for: they are ended by an operator.
FLAGS = ("--selection-strategy=full", "--rounds=100000", "--evaluate-every=0")


def fedhds(federation: Federation, *arguments: str, identity: str = "") -> subprocess.CompletedProcess[str]:
    """A command of the toolbox, under the certificate of `identity` if it has one."""
    flags = federation._tls_flags(identity) if identity else []
    done = programs.run("fedhds", *arguments, f"--server={federation.address()}", *flags)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def worked(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def adapter_of(federation: Federation, name: str) -> bytes:
    return (federation.folder / "out" / name / "adapter_model.safetensors").read_bytes()


@pytest.mark.long
def test_with_tls_an_operator_steers_the_run_and_nobody_else(federation: Federation) -> None:
    folder, run = federation.folder, federation.folder / "run"
    federation.tls = folder / "certs"
    init_authority(federation.tls)
    issue(federation.tls, "coordinator", role=Role.COORDINATOR, hosts=("127.0.0.1",))
    issue(federation.tls, "hospital", role=Role.SITE)
    issue(federation.tls, "alice", role=Role.OPERATOR)
    issue(federation.tls, "clinic", role=Role.SITE)
    server = federation.server(*FLAGS, "--min-sites=2", "--max-shards=2")
    shards = [write_rows(folder / f"ward-{number}.jsonl", {"sun": 4}) for number in (1, 2)]
    hospital = federation.client("hospital", "--data", *shards)
    # Two sites of one certificate are one: without the other the run would not begin.
    clinic = federation.client("clinic", "--data", shards[0])
    server.wait_for("round 1 of 100000 opens")

    reason = ("--reason", "we would rather not")
    for command in (("pause", *reason), ("resume",), ("stop", *reason), ("evict", "hospital/ward-1", *reason)):
        done = fedhds(federation, *command, identity="hospital")
        assert done.returncode == 1
        assert done.stderr == (
            "fedhds: the certificate of 'hospital' is a site's; have one issued with --role operator [FH23]\n"
        )
    assert state_of(run).paused is None
    assert "hospital/ward-1" in worked(fedhds(federation, "status", identity="hospital"))

    assert "paused" in worked(fedhds(federation, "pause", "--reason", "a new disk", identity="alice"))
    assert "paused: a new disk (alice)" in worked(fedhds(federation, "status", identity="alice"))
    assert fedhds(federation, "pause", identity="alice").returncode == 2
    done = fedhds(federation, "evict", "hostel", "--reason", "x", identity="alice")
    assert (done.returncode, "no site 'hostel' has ever enrolled" in done.stderr) == (1, True)
    worked(fedhds(federation, "evict", "hospital/ward-2", "--reason", "broken", identity="alice"))
    hospital.wait_for("hospital/ward-2: an operator has evicted this site: broken (alice)")
    # All sites of the certificate are out.
    assert hospital.wait() == 1
    worked(fedhds(federation, "resume", identity="alice"))
    resumed = state_of(run).round_number
    until(lambda: state_of(run).round_number > resumed + 1)
    assert set(state_of(run).closed_rounds[-1].contributions) == {"clinic"}
    worked(fedhds(federation, "stop", "--reason", "good enough", identity="alice"))
    assert server.wait() == 0, server.text
    assert clinic.wait() == 0
    assert "clinic: the run is stopped: good enough (alice)" in clinic.text
    checkpoint = run / "checkpoint" / "adapter_model.safetensors"
    assert adapter_of(federation, "clinic") == checkpoint.read_bytes()
    said = [
        "the run is paused: a new disk (alice)",
        "hospital with its sites hospital/ward-1, hospital/ward-2 is evicted: broken (alice)",
        "the run goes on: resumed by alice",
        "the run is stopped: good enough (alice)",
    ]
    assert [line for line in said if line not in server.text] == []


def watching(federation: Federation, server: str) -> Daemon:
    watch = federation.start("watch", "fedhds", "status", "--watch", f"--server={server}")
    watch.wait_for("round 1 of 100000 opens")
    return watch


@pytest.mark.long
def test_a_pause_outlives_a_coordinator_that_is_killed_and_who_watches_sees_all_of_it(federation: Federation) -> None:
    """Without TLS, from the coordinator's own host."""
    listen, run = f"127.0.0.1:{free_port()}", federation.folder / "run"
    server = federation.server(*FLAGS, "--min-sites=1", listen=listen)
    site = federation.client("a", f"--data={write_rows(federation.folder / 'a.jsonl', {'sun': 4})}")
    watch = watching(federation, listen)
    worked(fedhds(federation, "pause", "--reason", "night"))
    watch.wait_for("the run is paused: night")
    server.kill()
    watch.wait_for("asking again")
    server = federation.server(*FLAGS, "--min-sites=1", listen=listen)
    assert "paused: night" in worked(fedhds(federation, "status"))
    # What was in work may come in; nothing new is handed out.
    site.wait_for("a: the run is paused: night")
    before = state_of(run).round_number
    worked(fedhds(federation, "resume", "--reason", "morning"))
    until(lambda: state_of(run).round_number > before + 1)
    worked(fedhds(federation, "stop", "--reason", "enough"))
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
    assert watch.wait() == 0
    assert "Traceback" not in watch.text
    lines = watch.text.splitlines()
    places = [
        next(number for number, line in enumerate(lines) if line.endswith(words))
        for words in ("the run is paused: night", "the run goes on: morning", "the run is stopped: enough")
    ]
    assert places == sorted(places)
    # Every line once, and the picture at the end.
    journal = [line for line in lines if " closed with " in line]
    assert len(set(journal)) == len(journal)
    assert ": stopped, round" in watch.text


def test_watching_is_no_json(federation: Federation) -> None:
    done = programs.run("fedhds", "status", "--json", "--watch")
    assert done.returncode == 2
    assert done.stderr == "fedhds: --json prints one object and --watch goes on; choose one of them [FH10]\n"
