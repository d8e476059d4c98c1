"""Selections whose messages are too long for a call: they travel as artifacts, through kills too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedhds_server.run.state import RunState
from tests.support.federation import Daemon, Federation, free_port
from tests.support.hostile import state_of, until
from tests.support.tiny import write_rows

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

_FLAGS = (
    "--selection-strategy=federated-kmeans",
    "--kmeans-iterations=1",
    "--rounds=1",
    "--min-sites=2",
    "--evaluate-every=0",
    "--batch-size=64",
    "--max-length=64",
    "--heartbeat-timeout=20",
)


def sites(federation: Federation, rows: int) -> list[Daemon]:
    """Two sites with as many rows together."""
    half = rows // 2
    shards = [write_rows(federation.folder / f"{name}.jsonl", {name: half}) for name in ("sun", "sea")]
    return [start(federation, shard) for shard in shards]


def start(federation: Federation, shard: Path) -> Daemon:
    return federation.client(shard.stem, f"--data={shard}", "--allow-exact-kmeans-sums")


def picked(federation: Federation) -> int:
    report = json.loads((federation.folder / "run" / "report.json").read_text())
    return int(report["trained_rows"])


@pytest.mark.long
def test_a_budget_of_5000_rows(federation: Federation) -> None:
    """With the default dimension, centers and reports of such a budget have 20 MB."""
    server = federation.server(*_FLAGS, "--selection-budget=5000", "--feature-dimension=16")
    clients = sites(federation, 5200)
    assert server.wait(500) == 0, server.text
    assert [client.wait() for client in clients] == [0, 0], clients[0].text
    assert picked(federation) == 5000
    # What the steps asked and answered is gone.
    run = federation.folder / "run"
    needed = {artifact.digest for artifact in state_of(run).artifacts}
    assert {path.name for path in (run / "artifacts").iterdir()} == needed


@pytest.mark.long
def test_kills_amid_long_messages_change_nothing(tmp_path: Path, model: Path) -> None:
    flags = (*_FLAGS, "--selection-budget=150", "--feature-dimension=512")

    def finished(name: str, *, disturbed: bool) -> bytes:
        folder = tmp_path / name
        folder.mkdir()
        federation = Federation(folder, model)
        run = folder / "run"
        try:
            port = f"127.0.0.1:{free_port()}"
            server = federation.server(*flags, listen=port)
            clients = sites(federation, 300)
            if disturbed:
                until(lambda: long_step(state_of(run), replies=1))
                server.kill()
                assert long_step(state_of(run), replies=1)
                server = federation.server(*flags, listen=port)
                until(lambda: long_step(state_of(run), replies=0))
                clients[0].kill()
                clients[0] = start(federation, folder / "sun.jsonl")
            assert server.wait(300) == 0, server.text
            assert [client.wait() for client in clients] == [0, 0], clients[0].text
            assert picked(federation) == 150
            return (run / "checkpoint" / "adapter_model.safetensors").read_bytes()
        finally:
            federation.stop()

    assert finished("disturbed", disturbed=True) == finished("alone", disturbed=False)


def long_step(state: RunState, *, replies: int) -> bool:
    """Whether a step with a long request is open, and so many sites at least have answered it by uploads."""
    stage = state.stage
    answered = [reply for reply in stage.replies.values() if reply.long] if stage else []
    return stage is not None and stage.request_artifact is not None and len(answered) >= replies
