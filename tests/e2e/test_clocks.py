"""Wall clocks that jump by a day in mid-run: nothing that waits or counts as alive goes by them."""

from __future__ import annotations

import contextlib

import pytest

from fedhds_server.storage.sql import SqlStore
from tests.support.clocks import Clock
from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

DAY_S = 86_400


def final(federation: Federation, run: str, server: Daemon, sites: list[Daemon]) -> bytes:
    assert [server.wait(), *(site.wait() for site in sites)] == [0, 0, 0], server.text + sites[0].text + sites[1].text
    assert server.text.count("closed with 2 updates") == 3, server.text
    assert "is lost" not in server.text
    return (federation.folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes()


@pytest.mark.long
def test_clocks_that_jump_by_a_day_lose_nobody_and_nothing(federation: Federation) -> None:
    shards = [write_rows(federation.folder / f"{name}.jsonl", {name: 8}) for name in "ab"]
    flags = ("--rounds=3", "--selection-strategy=full", "--min-sites=2", "--heartbeat-timeout=20")
    clocks = {name: Clock(federation.folder / f"{name}.clock") for name in ("server", "a")}
    results = []
    for run in ("steady", "jumping"):
        jumps = run == "jumping"
        federation.environment = clocks["server"].environment() if jumps else {}
        server = federation.server(*flags, run=run)
        sites = []
        for name, path in zip("ab", shards, strict=True):
            federation.environment = clocks["a"].environment() if jumps and name == "a" else {}
            state = f"--state={federation.folder / run / name}"
            sites.append(federation.client(name, f"--data={path}", state, server=federation.address(run)))
        if jumps:
            for number, coordinators, sites_own in ((1, "+1d", "-1d"), (2, "-1d", "+1d")):
                server.wait_for(f"round {number} of 3 opens")
                clocks["server"].jump(coordinators)
                clocks["a"].jump(sites_own)
        results.append(final(federation, run, server, sites))
    assert results[0] == results[1]
    with contextlib.closing(SqlStore.in_folder(federation.folder / "jumping")) as store:
        times = [entry.at for entry in store.journal()]
    # The clock did jump.
    assert max(times) - min(times) > DAY_S
