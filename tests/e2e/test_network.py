"""Faults of the network between hosts: the run completes, and its adapter is that of an undisturbed run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.federation import Daemon, Federation
from tests.support.network import PORT, Network
from tests.support.tiny import make_model, write_rows

pytestmark = pytest.mark.e2e

SITES = "ab"
ROUNDS = 1
# Its adapter of 8 MB takes 8 s at 8 Mbit/s.
FLAGS = (f"--rounds={ROUNDS}", "--selection-strategy=full", "--min-sites=2", "--lora-rank=64", "--insecure")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model that is small but for its adapter."""
    return make_model(tmp_path_factory.mktemp("large-model"), hidden=256, layers=7)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, large_model: Path) -> bytes:
    """The final adapter of a run on loopback."""
    federation = Federation(tmp_path_factory.mktemp("undisturbed"), large_model)
    try:
        server = federation.server(*FLAGS)
        sites = [federation.client(name, f"--data={shard(federation, name)}") for name in SITES]
        return outcome(federation, server, sites)
    finally:
        federation.stop()


class Run:
    """A run whose coordinator and sites live on hosts of their own."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.network = Network(SITES)
        self.federation = Federation(folder, model)

    def begin(self, *flags: str) -> tuple[Daemon, dict[str, Daemon]]:
        """Starts the coordinator and the sites."""
        self.federation.prefix = self.network.on("hub")
        server = self.federation.server(*FLAGS, *flags, listen=f"0.0.0.0:{PORT}")
        sites = {}
        for name in SITES:
            self.federation.prefix = self.network.on(name)
            address = f"{self.network.address(name)}:{PORT}"
            sites[name] = self.federation.client(name, f"--data={shard(self.federation, name)}", server=address)
        return server, sites


@pytest.fixture
def run(tmp_path: Path, large_model: Path) -> Iterator[Run]:
    """Hosts, and a folder for what runs on them; both are ended with the test."""
    made = Run(tmp_path, large_model)
    yield made
    made.federation.stop()
    made.network.close()


# What grpcio prints by itself, at the end of the process, for a call whose broken link it has not noticed yet.
_CALL_LEFT_OVER = re.compile(r"Traceback .*\n  File .*_schedule_rpc_coro\nasyncio\.exceptions\.CancelledError\n")


def shard(federation: Federation, name: str) -> Path:
    return write_rows(federation.folder / f"{name}.jsonl", {name: 8})


def outcome(federation: Federation, server: Daemon, sites: list[Daemon]) -> bytes:
    """The final adapter, which every site has and to which every site gave in every round."""
    statuses = (server.wait(), *(site.wait() for site in sites))
    assert not any(statuses), server.text + "".join(site.text for site in sites)
    assert server.text.count("closed with 2 updates") == ROUNDS, server.text
    assert "is lost" not in server.text
    assert "Traceback" not in _CALL_LEFT_OVER.sub("", server.text) + "".join(site.text for site in sites)
    final = (federation.folder / "run" / "checkpoint" / "adapter_model.safetensors").read_bytes()
    for name in SITES:
        assert (federation.folder / "out" / name / "adapter_model.safetensors").read_bytes() == final
    return final


def until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s:g} s"
        time.sleep(0.1)


@pytest.mark.long
def test_one_packet_in_twenty_is_lost(run: Run, undisturbed: bytes) -> None:
    for host in ("hub", *SITES):
        run.network.filter(host, "-m statistic --mode random --probability 0.05 -j DROP")
    server, sites = run.begin()
    assert outcome(run.federation, server, list(sites.values())) == undisturbed
    assert all(run.network.packets(host) for host in ("hub", *SITES))


def test_cables_are_pulled_out_for_three_seconds(run: Run, undisturbed: bytes) -> None:
    """All at once, while the adapter is on its way."""
    server, sites = run.begin()
    server.wait_for("round 1 of 1 opens")
    for state, pause_s in (("down", 3), ("up", 0)):
        for name in SITES:
            run.network.cable(name, state)
        time.sleep(pause_s)
    assert outcome(run.federation, server, list(sites.values())) == undisturbed


@pytest.mark.long
def test_a_slow_link_is_not_silence(run: Run, undisturbed: bytes) -> None:
    """At 8 Mbit/s a transfer takes longer than the heartbeat time-out."""
    run.network.slow("a", "8mbit")
    heartbeat_timeout = 5
    assert len(undisturbed) / 1e6 > heartbeat_timeout
    server, sites = run.begin(f"--heartbeat-timeout={heartbeat_timeout}")
    began = time.monotonic()
    assert outcome(run.federation, server, list(sites.values())) == undisturbed
    assert time.monotonic() - began > 2 * len(undisturbed) / 1e6


@pytest.mark.long
def test_a_link_on_which_a_ping_waits_behind_a_transfer_is_not_silent(run: Run) -> None:
    """At 1 Mbit/s a chunk takes 8 s, nearly as long as the answer to a ping may."""
    run.network.slow("a", "1mbit")
    server, sites = run.begin("--lora-rank=32")
    for daemon in (server, *sites.values()):
        assert daemon.wait(300) == 0, daemon.text
    assert "cannot reach" not in sites["a"].text


@pytest.mark.long
def test_connections_are_reset_again_and_again(run: Run, undisturbed: bytes) -> None:
    reset = "-p tcp -m statistic --mode nth --every 150 --packet 149 -j REJECT --reject-with tcp-reset"
    for host in ("hub", *SITES):
        run.network.filter(host, reset)
    # Chance may let several resets in a row meet one side only, which then notices nothing for 20 s each.
    server, sites = run.begin("--heartbeat-timeout=120")
    assert outcome(run.federation, server, list(sites.values())) == undisturbed
    assert sum(run.network.packets(host) for host in ("hub", *SITES)) > 5
    assert any("trying again" in site.text for site in sites.values())


@pytest.mark.long
def test_half_open_connections_are_noticed_on_both_sides(run: Run, undisturbed: bytes) -> None:
    """One site hears nothing more, of the other nothing more is heard; both come back when the network does."""
    server, sites = run.begin("--heartbeat-timeout=120")
    server.wait_for("round 1 of 1 opens")
    run.network.filter("a", "-j DROP")
    run.network.filter("hub", "-i to-b -j DROP")
    for site in sites.values():
        site.wait_for("cannot reach")
    until(lambda: run.network.connections("b") == 0, "the coordinator drops what is dead")
    run.network.heal()
    assert outcome(run.federation, server, list(sites.values())) == undisturbed


# Passes bytes on between a port of its host and an address; stopped, it keeps both connections and is silent.
_RELAY = """
import asyncio, sys

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)

async def serve(reader, writer):
    inside, outside = await asyncio.open_connection(sys.argv[2], int(sys.argv[3]))
    await asyncio.gather(pump(reader, outside), pump(inside, writer))

async def main():
    await (await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))).serve_forever()

asyncio.run(main())
"""


@pytest.mark.long
def test_a_silent_link_is_noticed_after_the_ping_time_out_on_both_sides(run: Run) -> None:
    """Of one site nothing arrives; the other's connection leads over a relay that still acknowledges what it gets."""
    network, federation = run.network, run.federation
    federation.prefix = network.on("hub")
    federation.server("--insecure", "--rounds=1", "--min-sites=3", listen=f"0.0.0.0:{PORT}")
    words = [*network.on("a"), sys.executable, "-c", _RELAY, str(PORT), network.address("a"), str(PORT)]
    with subprocess.Popen(words) as relay:
        try:
            places = {"a": f"127.0.0.1:{PORT}", "b": f"{network.address('b')}:{PORT}"}
            sites = {}
            for name, place in places.items():
                federation.prefix = network.on(name)
                sites[name] = federation.client(name, f"--data={shard(federation, name)}", server=place)
                sites[name].wait_for("enrolled")
            relay.send_signal(signal.SIGSTOP)
            for host, rule in (("hub", "-i to-b -j DROP"), ("b", "-j DROP")):
                network.filter(host, rule)
            began = time.monotonic()
            noticed: dict[str, float] = {}

            def all_notice() -> bool:
                for name in SITES:
                    for end, notices in (
                        ("site", "cannot reach" in sites[name].text),
                        ("coordinator", not network.connections(name)),
                    ):
                        if notices:
                            noticed.setdefault(f"{end} {name}", time.monotonic() - began)
                return len(noticed) == 2 * len(SITES)

            until(all_notice, "both ends notice", timeout_s=120)
        finally:
            relay.kill()
    # 10 s (30 s at the coordinator) without a byte, 10 s for the answer to a ping, 3 s for what the site says.
    assert all(seconds < (28 if end.startswith("site") else 46) for end, seconds in noticed.items()), noticed
