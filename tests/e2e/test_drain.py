"""SIGTERM in mid-run: every daemon ends within the grace of its container, and the run loses nothing by it."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
import yaml

from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

ROUNDS = 8
FLAGS = (f"--rounds={ROUNDS}", "--selection-strategy=full", "--min-sites=2", "--quorum=100%", "--evaluate-every=0")
DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def grace_s() -> float:
    """The shortest time that a container is given to stop."""
    stack = yaml.safe_load((DEPLOY / "compose" / "docker-compose.yml").read_text())
    given = {
        float(service["stop_grace_period"].removesuffix("s"))
        for service in stack["services"].values()
        if "stop_grace_period" in service
    }
    stateful = yaml.safe_load((DEPLOY / "kubernetes" / "coordinator" / "statefulset.yaml").read_text())
    job = yaml.safe_load((DEPLOY / "kubernetes" / "site" / "job.yaml").read_text())
    pods = [manifest["spec"]["template"]["spec"] for manifest in (stateful, job)]
    return min(given | {float(pod["terminationGracePeriodSeconds"]) for pod in pods})


def start(federation: Federation, run: str) -> dict[str, Daemon]:
    """A coordinator and two sites, of which nothing but the run folder's name differs from run to run."""
    started = {"server": federation.server(*FLAGS, run=run)}
    return started | {name: site(federation, run, name) for name in "ab"}


def site(federation: Federation, run: str, name: str) -> Daemon:
    path = federation.folder / f"{name}.jsonl"
    if not path.exists():
        write_rows(path, {"sun": 60})
    flags = (f"--data={path}", f"--state={federation.folder / 'state' / run / name}")
    return federation.client(name, *flags, server=federation.address(run))


@pytest.mark.parametrize("stopped", ["server", pytest.param("a", marks=pytest.mark.long)])
def test_a_daemon_that_is_told_to_stop_does_so_in_time_and_loses_nothing(federation: Federation, stopped: str) -> None:
    for daemon in start(federation, "plain").values():
        assert daemon.wait() == 0, daemon.text
    adapter = "checkpoint/adapter_model.safetensors"
    expected = (federation.folder / "plain" / adapter).read_bytes()

    daemons = start(federation, "stopped")
    address = federation.address("stopped")
    daemons["server"].wait_for("round 2 closed")
    began = time.monotonic()
    daemons[stopped].process.send_signal(signal.SIGTERM)
    assert daemons[stopped].wait(grace_s()) == 128 + signal.SIGTERM
    print(f"{stopped} ended after {time.monotonic() - began:.2f} s")
    assert "start again" in daemons[stopped].text
    assert f"round {ROUNDS} closed" not in daemons["server"].text, "the run was over before the signal"
    if stopped == "server":
        daemons["server"] = federation.server(*FLAGS, run="stopped", listen=address)
    else:
        daemons["a"] = site(federation, "stopped", "a")
    for daemon in daemons.values():
        assert daemon.wait() == 0, daemon.text
    assert (federation.folder / "stopped" / adapter).read_bytes() == expected
    # No round was played twice.
    text = "".join(daemon.text for daemon in federation.daemons[3:] if "fedhds-server" in daemon.text)
    closed = re.findall(r"round (\d+) closed", text)
    assert closed == [str(number) for number in range(1, ROUNDS + 1)]


@pytest.mark.parametrize("program", ["fedhds-server", "fedhds-client"])
def test_the_first_process_of_a_container_ends_while_it_still_starts(
    federation: Federation, program: str, tmp_path: Path
) -> None:
    if os.geteuid():
        pytest.skip("a namespace of processes takes root")
    # The kernel spares the first process of a namespace from signals that it has no handler for.
    fifo = tmp_path / "settings.yaml"
    os.mkfifo(fifo)
    daemon = federation.start(
        "first", program, f"--config={fifo}", prefix=("unshare", "--pid", "--fork", "--kill-child")
    )
    # It opens the file while it reads its settings, and then waits for what is never written.
    with fifo.open("wb"):
        first = children(daemon.process.pid)
        os.kill(first, signal.SIGTERM)
        assert daemon.wait(30) == 128 + signal.SIGTERM


def children(pid: int) -> int:
    (only,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(only)
