"""deploy/compose under a real engine: runs end with mutual TLS, whatever becomes of a container in mid-run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.compose_stack import SITES, Stack, compose_command
from tests.support.tiny import make_model, write_rows

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

# Of the compose file.
GRACE_S = 30.0
HEARTBEAT_TIMEOUT_S = 5

Start = Callable[..., AbstractContextManager[Stack]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    command = compose_command()
    folder = tmp_path_factory.mktemp("compose")
    make_model(folder / "models" / "tiny")
    shards = folder / "shards"
    shards.mkdir()
    for number, site in enumerate(SITES):
        write_rows(shards / f"{site}.jsonl", {"sun": 100, "moon": 20 * number})
    write_rows(shards / "unseen.jsonl", {"wind": 5})
    # For the containers' user, who reads through the mounts alone.
    for path in [*(folder / "models").rglob("*"), *shards.iterdir(), folder / "models"]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    given = {"MODEL": "/models/tiny", "MODELS": str(folder / "models"), "SHARDS": str(shards), "MAX_LENGTH": "256"}

    @contextmanager
    def started(**settings: str) -> Iterator[Stack]:
        stack = Stack(command, f"fedhds-test-{os.getpid()}", given | settings)
        try:
            stack.up()
            yield stack
        finally:
            stack.remove()

    return started


def check_the_end(stack: Stack, to: Path) -> None:
    """The run is complete, everybody ended well, and all have one adapter, which PEFT loads."""
    for service in ("coordinator", "evaluator", *SITES):
        assert stack.wait_for_exit(service) == 0, stack.log(service)
        assert "Traceback" not in stack.log(service)
    assert "the run is complete" in stack.log("coordinator")
    assert "mutual TLS" in stack.log("coordinator")
    folders = [stack.copy(site, "/var/lib/fedhds/adapter", to / site) for site in ("evaluator", *SITES)]
    folders.append(stack.copy("coordinator", "/var/lib/fedhds/run/checkpoint", to / "coordinator"))
    assert len({(folder / "adapter_model.safetensors").read_bytes() for folder in folders}) == 1

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stack.model), folders[-1])
    learned = [value for name, value in loaded.named_parameters() if "lora_B" in name]
    assert learned
    assert all(bool(value.abs().sum()) for value in learned)


def test_a_run_ends_and_nobody_is_root_or_can_write_to_its_image(start: Start, tmp_path: Path) -> None:
    with start(ROUNDS="4", BUDGET="20") as stack:
        for service in ("coordinator", "evaluator", *SITES):
            described = stack.state(service)
            assert described["Config"]["User"] == "10001:10001"
            assert described["HostConfig"]["ReadonlyRootfs"]
        assert stack.state("coordinator")["State"]["Health"]["Status"] == "healthy"
        check_the_end(stack, tmp_path)
        # What each party holds of the authority's making: its own key and no other.
        for party in ("coordinator", "evaluator", *SITES):
            held = stack.copy(party, "/etc/fedhds/tls", tmp_path / f"tls-{party}")
            assert sorted(path.name for path in held.iterdir()) == sorted(["ca.crt", f"{party}.crt", f"{party}.key"])


def test_the_coordinators_image_is_small_and_has_no_torch(start: Start) -> None:
    size = subprocess.run(["docker", "image", "inspect", "fedhds-server", "-f", "{{.Size}}"], capture_output=True)
    assert int(size.stdout) < 600e6
    imported = subprocess.run(
        ["docker", "run", "--rm", "--entrypoint", "python", "fedhds-server", "-c", "import torch"], capture_output=True
    )
    assert b"No module named 'torch'" in imported.stderr


def killed(stack: Stack, service: str) -> None:
    # Not `docker kill`, after which the engine leaves the container down: as the kernel does when memory runs out.
    pid = stack.state(service)["State"]["Pid"]
    restarts = stack.state(service)["RestartCount"]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while stack.state(service)["RestartCount"] == restarts:
        assert time.monotonic() < deadline, "the engine does not start it again"
        time.sleep(0.1)


def paused(stack: Stack, service: str) -> None:
    stack.docker("pause", stack.container(service))
    # Longer than the heartbeat time-out: it is lost, and comes back.
    time.sleep(HEARTBEAT_TIMEOUT_S + 2)
    stack.docker("unpause", stack.container(service))


def disconnected(stack: Stack, service: str) -> None:
    container = stack.container(service)
    ((network, _),) = stack.state(service)["NetworkSettings"]["Networks"].items()
    stack.docker("network", "disconnect", network, container)
    time.sleep(HEARTBEAT_TIMEOUT_S + 2)
    stack.docker("network", "connect", "--alias", service, network, container)


def restarted(stack: Stack, service: str) -> None:
    """By SIGTERM: it ends by itself before the engine would kill it, and says so by its exit status."""
    began = time.monotonic()
    stack.docker("stop", "--time", str(int(GRACE_S)), stack.container(service))
    assert time.monotonic() - began < GRACE_S
    assert stack.state(service)["State"]["ExitCode"] == 128 + signal.SIGTERM
    stack.docker("start", stack.container(service))


@pytest.mark.parametrize("service", ["coordinator", "site-2"])
def test_a_run_ends_whatever_becomes_of_a_container(start: Start, tmp_path: Path, service: str) -> None:
    with start(ROUNDS="60", STRATEGY="full", HEARTBEAT_TIMEOUT=str(HEARTBEAT_TIMEOUT_S)) as stack:
        for happens in (killed, paused, disconnected, restarted):
            stack.wait_for_round(stack.rounds() + 2)
            assert "the run is complete" not in stack.log("coordinator"), f"too early for {happens.__name__}"
            happens(stack, service)
        check_the_end(stack, tmp_path)
        log = stack.log("coordinator")
        # Every round closed once: what was done before a disturbance was not done again after it.
        assert [f"round {number} closed" in log for number in range(1, 61)] == [True] * 60
        assert stack.rounds() == 60
