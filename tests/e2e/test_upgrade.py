"""What the last released version wrote opens in this one: a run and its sites go on where they were."""

from __future__ import annotations

import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedhds import __version__
from tests.e2e import earlier
from tests.e2e.federation import Federation
from tests.e2e.test_standby import ROUNDS, Pair, closed
from tests.postgres import PostgresServer
from tests.tiny import write_rows

pytestmark = pytest.mark.e2e

TAG = "v0.1.0"


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """In which console scripts run the code of the tag; skips where there is no such tag."""
    if not earlier.has_tag(TAG):
        pytest.skip(f"this clone has no tag {TAG}, whose code would run here; git fetch --tags")
    with earlier.code_of(TAG) as made:
        yield made


def tensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def check_that_it_goes_on(folder: Path, scratch: Path) -> None:
    """Ends the run in `folder` with this version's daemons; nothing that the earlier one had accepted is done again."""
    was, told = earlier.looked_at(folder, scratch)
    assert (was["round"], was["phase"], list(was["updates"])) == (2, "training", ["a"])
    assert [task["site"] for task in was["tasks"].values() if task["kind"] == "train"] == ["b"]
    accepted = was["updates"]["a"]
    accepted_bytes = (folder / "run" / "artifacts" / accepted["artifact"]["digest"]).read_bytes()
    (part,) = (folder / "run" / "artifacts").glob("*.part")
    assert 0 < part.stat().st_size < len(accepted_bytes)

    federation = Federation(folder, earlier.MODEL)
    try:
        server = federation.server(*earlier.COORDINATOR, "--keep-updates")
        server.wait_for(f"going on with run {was['run_id']}")
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
    assert rounds[0] == was["closed_rounds"][0]
    assert rounds[1]["contributions"]["a"] == accepted["samples"]
    assert [set(entry["contributions"]) for entry in rounds] == [{"a", "b"}] * 3
    assert list(ended["evaluations"]) == ["0", "1", "2", "3"]

    updates = folder / "run" / "artifacts" / "updates"
    assert (updates / "round-2" / "a.safetensors").read_bytes() == accepted_bytes
    checkpoint = folder / "run" / "checkpoint" / "adapter_model.safetensors"
    for name in earlier.SITES:
        assert (folder / "out" / name / "adapter_model.safetensors").read_bytes() == checkpoint.read_bytes()
    # No site has more than half of the weight, so both have half.
    last = [tensors(updates / "round-3" / f"{name}.safetensors") for name in earlier.SITES]
    final = tensors(checkpoint)
    assert any(values.any() for name, values in final.items() if "lora_B" in name)
    for name, values in final.items():
        short = name.removeprefix("base_model.model.")
        found = [next(own[key] for key in own if key.endswith(short)) for own in last]
        np.testing.assert_allclose(values, np.mean(found, axis=0), rtol=1e-5, atol=1e-7)


def test_a_run_that_the_last_version_left_in_mid_round_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run-of-before"
    with tarfile.open(earlier.archive_of(TAG)) as packed:
        packed.extractall(folder, filter="data")
    check_that_it_goes_on(folder, tmp_path / "copy")


def test_the_same_with_a_run_that_the_last_version_makes_now(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "run-of-before"
    folder.mkdir()
    earlier.interrupt(folder, environment)
    check_that_it_goes_on(folder, tmp_path / "copy")


@pytest.mark.parametrize("older", ["server", "site a"])
def test_the_last_version_and_this_one_work_together(
    federation: Federation, environment: dict[str, str], older: str
) -> None:
    said = {}
    for which, variables in (("old", environment), ("new", {})):
        federation.environment = variables
        asked = federation.start("version", "fedhds-client", "--version")
        assert asked.wait() == 0
        said[which] = asked.text.strip()
    assert said == {"old": f"fedhds-client {TAG.removeprefix('v')}", "new": f"fedhds-client {__version__}"}
    assert said["old"] != said["new"]

    federation.environment = environment if older == "server" else {}
    server = federation.server("--rounds=2", "--strategy=fedhds-aligned", "--budget=6", "--fusion=pca")
    sites = []
    for name in "ab":
        federation.environment = environment if older == f"site {name}" else {}
        path = write_rows(federation.folder / f"{name}.jsonl", {name: 7, "sea": 5})
        sites.append(federation.client(name, f"--data={path}"))
    for daemon in (server, *sites):
        assert daemon.wait() == 0, daemon.text
    assert server.text.count("closed with 2 updates") == 2
    final = federation.folder / "run" / "checkpoint" / "adapter_model.safetensors"
    for name in "ab":
        assert (federation.folder / "out" / name / "adapter_model.safetensors").read_bytes() == final.read_bytes()


def test_a_standby_of_this_version_takes_over_from_a_leader_of_the_last_one(
    federation: Federation, environment: dict[str, str], postgres: PostgresServer
) -> None:
    """The rolling upgrade of docs/operations.md."""
    pair = Pair(federation, postgres)
    now = dict(federation.environment)
    federation.environment = now | environment
    first = pair.server("one")
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    second.process.send_signal(signal.SIGTERM)
    second.wait()
    federation.environment = now
    second = pair.server("two")
    second.wait_for("standing by: the coordinator at")
    federation.environment = now | environment
    sites = [pair.client(name) for name in "ab"]
    federation.environment = now
    first.wait_for("round 2 closed")
    first.process.send_signal(signal.SIGTERM)
    first.wait()
    second.wait_for("going on with run")
    again = pair.server("one")
    for daemon in (second, again, *sites):
        assert daemon.wait() == 0, daemon.text
    assert f"fedhds-server {TAG.removeprefix('v')} listens" in first.text
    assert f"fedhds-server {__version__} listens" in second.text
    assert closed(pair.journal()) == ROUNDS


def test_the_fixture_is_small() -> None:
    assert earlier.archive_of(TAG).stat().st_size < 200_000
