"""kill -9 at every step of a run: the run ends with the same adapter, byte for byte, as one that nothing disturbed."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from tests.support import kill_points
from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

# The longest life of one process; a site lives through all kills of its coordinator.
_LIFE_S = 300.0
_COMMON = (
    "--quorum=100%",
    "--lora-rank=64",
    "--local-epochs=2",
    "--feature-dimension=16",
)
# All changes of what a run that ends well does are in one of these.
_RUNS = {
    "federated-kmeans": (
        "--selection-strategy=federated-kmeans",
        # Deletions follow a round's result; those of the second round come after all kills around the result.
        "--rounds=3",
        "--selection-budget=4",
        "--kmeans-iterations=1",
        "--min-evaluators=1",
        "--server-optimizer=momentum",
    ),
    "aligned": (
        "--selection-strategy=fedhds-aligned",
        "--rounds=2",
        "--selection-schedule=per-round",
        "--selection-budget=4",
        "--reduction=pca",
    ),
    "secure": (
        "--selection-strategy=full",
        "--rounds=2",
        "--min-sites=3",
        "--secure-aggregation",
        "--min-secure-sites=3",
        "--server-optimizer=momentum",
    ),
    "random": ("--selection-strategy=random", "--rounds=2", "--selection-schedule=per-round", "--selection-budget=4"),
}
_CHANGE = r"[a-z]+-[a-z]+ (un)?committed"
# A site says goodbye once, when it has the final adapter. A coordinator that is not there to hear it stays for one
# heartbeat time-out when it is back, and takes the site for lost; neither is a part of the run.
_COORDINATOR_POINTS = "(?!SiteLeft|SiteSilent).*"
# A site that has heard that its delivery is noted has nothing left to do.
_LAST_OF_SITE = "ConfirmDelivery heard"
_SITE_POINTS = f"(?!{_LAST_OF_SITE}).*"


@dataclass(frozen=True)
class Outcome:
    """What came of a run, and the points that its coordinator ("server") and its sites ("sites") reached."""

    adapters: set[bytes]
    rounds: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    best: tuple[int, bytes]
    """The round with the lowest validation loss, and its adapter."""
    artifacts: set[str]
    """What is left of adapters and updates at the coordinator."""
    reached: dict[str, set[str]] = field(compare=False)


class Run:
    """A coordinator and the sites `names`, which are started again whenever a point has killed them."""

    def __init__(
        self,
        federation: Federation,
        name: str,
        *,
        heartbeat_timeout: int,
        server: str = "",
        sites: str = "",
        names: str = "ab",
    ) -> None:
        """`server` and `sites` are patterns of the points at which they die; see kill_points."""
        self._federation = federation
        self._flags = (*_COMMON, *_RUNS[name], f"--heartbeat-timeout={heartbeat_timeout}")
        self._patterns = {"server": server, "sites": sites}
        self._ending = threading.Event()
        self._names = names
        self.lives: dict[str, list[Daemon]] = {name: [] for name in ("server", *names)}

    def outcome(self) -> Outcome:
        """Runs to the end; fails when a process ends in any other way."""
        federation, folder = self._federation, self._federation.folder
        for name in self._patterns:
            (folder / "points" / name).mkdir(parents=True)
        listen = f"127.0.0.1:{_quiet_port()}"
        shards = {name: write_rows(folder / f"{name}.jsonl", {name: 7, "sea": 5}) for name in self._names}
        common = ("--allow-exact-kmeans-sums", "--inference-batch-size=4")
        validation = write_rows(folder / "v.jsonl", {"hills": 6})
        site_a = (f"--data={shards['a']}", f"--eval-data={shards['b']}", f"--validation-data={validation}", *common)
        flags = {
            "server": federation.server_flags(*self._flags, listen=listen),
            "a": federation.client_flags("a", *site_a, server=listen),
        }
        for name in self._names[1:]:
            flags[name] = federation.client_flags(name, f"--data={shards[name]}", *common, server=listen)
        with ThreadPoolExecutor(len(flags)) as pool:
            lives = [pool.submit(self._live, name, flags[name]) for name in flags]
            for life in lives:
                life.result()
        report = json.loads((folder / "run" / "report.json").read_text())
        for closed in report["closed_rounds"]:
            del closed["seconds"]
        adapters = [folder / "run" / "checkpoint", *(folder / "out" / name for name in self._names)]
        return Outcome(
            adapters={_tensors(path) for path in adapters},
            rounds=report["closed_rounds"],
            evaluations=report["evaluations"],
            validations=report["validations"],
            best=(report["best_round"], _tensors(folder / "run" / "checkpoint-best")),
            artifacts={path.name for path in (folder / "run" / "artifacts").iterdir()},
            reached={name: {path.name for path in (folder / "points" / name).iterdir()} for name in self._patterns},
        )

    def said(self, name: str, words: str) -> int:
        """How often the processes `name` printed what matches."""
        return sum(len(re.findall(words, daemon.text)) for daemon in self.lives[name])

    def _live(self, name: str, flags: list[object]) -> None:
        kind, program = ("server", "fedhds-server") if name == "server" else ("sites", "fedhds-client")
        points = self._federation.folder / "points" / kind
        prefix = (sys.executable, kill_points.__file__, str(points), self._patterns[kind])
        while not self._ending.is_set():
            daemon = self._federation.start(name, program, *flags, prefix=prefix)
            self.lives[name].append(daemon)
            status = daemon.wait(_LIFE_S)
            if status == 0:
                return
            if status != -signal.SIGKILL:
                self._ending.set()
                self._federation.stop()
                raise AssertionError(f"{name} ended with status {status}:\n{daemon.text}")


def _tensors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def _quiet_port() -> int:
    """A free port that the system gives to no outgoing connection.

    Else a site that tries to reach a coordinator that is down might take the port, or find itself there.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, lowest)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Outcome]:
    """The outcome of a run in which nothing dies."""

    @cache
    def outcome(name: str) -> Outcome:
        federation = Federation(tmp_path_factory.mktemp(f"undisturbed-{name}"), model)
        # Once with hashes of another seed in every process, which forks do not have.
        federation.installed = name == "federated-kmeans"
        try:
            return Run(federation, name, heartbeat_timeout=60).outcome()
        finally:
            federation.stop()

    return outcome


@pytest.mark.parametrize(
    ("name", "points", "least"),
    [
        pytest.param("federated-kmeans", _COORDINATOR_POINTS, 25, id="federated-kmeans", marks=pytest.mark.long),
        pytest.param("aligned", _CHANGE, 10, id="aligned", marks=pytest.mark.long),
        pytest.param("random", _CHANGE, 10, id="random"),
    ],
)
def test_a_coordinator_that_is_killed_everywhere(
    federation: Federation, undisturbed: Callable[[str], Outcome], name: str, points: str, least: int
) -> None:
    plain = undisturbed(name)
    run = Run(federation, name, heartbeat_timeout=20, server=points)
    killed = run.outcome()
    # A point kills when it is first reached, so all that an undisturbed run passes, new ones too, have killed.
    # A killed run may pass more: what was uploaded again after its answer was lost is deleted as late.
    assert killed.reached["server"] >= {point for point in plain.reached["server"] if re.fullmatch(points, point)}
    assert len(run.lives["server"]) > least
    assert killed == plain
    assert len(killed.adapters) == 1
    assert [line["round_number"] for line in killed.validations] == list(range(len(killed.rounds) + 1))
    for site in "ab":
        assert len(run.lives[site]) == 1
        # What was trained was never lost: not the site's work, nor what the coordinator had accepted.
        assert run.said(site, "round 1 trains on") == run.said(site, "round 2 trains on") == 1
    assert not run.said("server", "failed|Traceback")


def test_sites_that_are_killed_everywhere(federation: Federation, undisturbed: Callable[[str], Outcome]) -> None:
    plain = undisturbed("federated-kmeans")
    _certified(federation, "ab")
    # A killed site is back within the time-out, also on a busy machine: a selection without it would be another.
    run = Run(federation, "federated-kmeans", heartbeat_timeout=100, sites=_SITE_POINTS)
    killed = run.outcome()
    assert killed.reached["sites"] == plain.reached["sites"]
    assert len(run.lives["a"]) + len(run.lives["b"]) - 2 == len(killed.reached["sites"] - {_LAST_OF_SITE}) >= 15
    assert killed == plain
    assert len(killed.adapters) == 1
    assert not run.said("server", "failed|is lost|Traceback")


@pytest.fixture(scope="module")
def undisturbed_sum(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[Outcome, dict[str, Any]]:
    """The outcome of a run under secure aggregation in which nothing dies, and its adapter."""
    federation = Federation(tmp_path_factory.mktemp("undisturbed-secure"), model)
    _certified(federation, "abc")
    try:
        outcome = Run(federation, "secure", heartbeat_timeout=60, names="abc").outcome()
    finally:
        federation.stop()
    return outcome, _adapter(federation)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("killed", ["server", "sites"])
def test_a_secure_run_that_is_killed_everywhere(
    federation: Federation, undisturbed_sum: tuple[Outcome, dict[str, Any]], killed: str
) -> None:
    plain, adapter = undisturbed_sum
    _certified(federation, "abc")
    points = {"server": _COORDINATOR_POINTS, "sites": _SITE_POINTS}[killed]
    run = Run(federation, "secure", heartbeat_timeout=100, names="abc", **{killed: points})
    outcome = run.outcome()
    steps = {"keys", "shares", "begin_masking", "masks", "keep_masked", "sign", "open"}
    assert {f"secure {step} ended" for step in steps} <= outcome.reached["sites"]
    assert {f"StageResolved NextStep {step} committed" for step in range(4)} <= outcome.reached["server"]
    assert outcome.reached[killed] >= {point for point in plain.reached[killed] if re.fullmatch(points, point)}
    lives = [len(run.lives[name]) - 1 for name in (["server"] if killed == "server" else "abc")]
    assert sum(lives) >= 20
    # Nobody was left out, and no site was asked for a second list or a second update.
    for closed, undisturbed in zip(outcome.rounds, plain.rounds, strict=True):
        assert closed["contributors"] == undisturbed["contributors"] == list("abc")
        assert closed["samples"] == undisturbed["samples"]
    assert not any(run.said(name, "ListChanged|RoundReplayed|sits the round out|FH6") for name in ("server", *"abc"))
    assert len(outcome.adapters) == 1
    for key, value in _adapter(federation).items():
        # Each run draws its own rounding.
        assert value == pytest.approx(adapter[key], abs=1e-6)
    assert not run.said("server", "Traceback")


def _certified(federation: Federation, names: str) -> None:
    federation.tls = federation.folder / "certs"
    init_authority(federation.tls)
    issue(federation.tls, "coordinator", role=Role.COORDINATOR, hosts=("127.0.0.1",))
    for name in names:
        issue(federation.tls, name, role=Role.SITE)


def _adapter(federation: Federation) -> dict[str, Any]:
    return load_file(federation.folder / "run" / "checkpoint" / "adapter_model.safetensors")
