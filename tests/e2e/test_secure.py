"""A run under secure aggregation with real processes and mutual TLS, next to the same run in the clear."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from tests.support.federation import Daemon, Federation
from tests.support.tiny import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

# The same training in both runs: what differs is rounding, to steps of 10 / 2^31, and weights, to steps of 2^-20.
FLAGS = (
    "--rounds=2",
    "--min-sites=3",
    "--quorum=100%",
    "--selection-strategy=full",
    "--heartbeat-timeout=60",
    "--evaluate-every=0",
)
SECURE = ("--secure-aggregation", "--min-secure-sites=3")


def start(federation: Federation, *flags: str) -> tuple[Daemon, list[Daemon]]:
    federation.tls = federation.folder / "certs"
    init_authority(federation.tls)
    issue(federation.tls, "coordinator", role=Role.COORDINATOR, hosts=("127.0.0.1",))
    for name in "abc":
        issue(federation.tls, name, role=Role.SITE)
        write_rows(federation.folder / f"{name}.jsonl", {name: 6, "sea": 2})
    server = federation.server(*FLAGS, *flags)
    own = ("--require-secure-sites=3",) if flags else ()
    return server, [federation.client(name, f"--data={federation.folder / f'{name}.jsonl'}", *own) for name in "abc"]


def check(federation: Federation) -> None:
    """Nothing of single sites is left at the coordinator, no secrets and no updates at the sites."""
    names = [path.name for path in (federation.folder / "run" / "artifacts").iterdir()]
    assert len(names) == 2, names
    records = list(federation.folder.glob("state/*/*/*/secure-round.json"))
    assert len(records) == 3
    for record in records:
        known = json.loads(record.read_text())
        assert known["round_number"] == 2
        assert not any(known[secret] for secret in ("mask_private", "share_private", "seed", "rounding"))
    assert not list(federation.folder.glob("state/*/*/*/update-*.safetensors"))
    assert not list(federation.folder.glob("state/*/*/*/masked-*"))


def test_three_sites_run_to_the_end(federation: Federation) -> None:
    server, sites = start(federation, *SECURE)
    assert [daemon.wait() for daemon in (server, *sites)] == [0] * 4, server.text + sites[0].text
    check(federation)
    assert all(site.text.count("update is masked among 3 sites") == 2 for site in sites)
    report = json.loads((federation.folder / "run" / "report.json").read_text())
    assert [closed["contributors"] for closed in report["closed_rounds"]] == [list("abc")] * 2


@pytest.mark.long
def test_the_result_is_that_of_the_same_run_in_the_clear(tmp_path: Path, model: Path, federation: Federation) -> None:
    plain = Federation(tmp_path / "plain", model)
    plain.folder.mkdir()
    adapters = []
    try:
        for each, flags in ((plain, ()), (federation, SECURE)):
            server, sites = start(each, *flags)
            assert [daemon.wait() for daemon in (server, *sites)] == [0] * 4, server.text
            adapters.append(load_file(each.folder / "run" / "checkpoint" / "adapter_model.safetensors"))
    finally:
        plain.stop()
    clear, secure = adapters
    assert secure.keys() == clear.keys()
    assert all(np.abs(value).max() > 1e-4 for key, value in clear.items() if "lora_B" in key)
    for key, value in clear.items():
        # Steps of 5e-9 and shares in millionths, which the second round's training enlarges.
        assert secure[key] == pytest.approx(value, abs=1e-5)
