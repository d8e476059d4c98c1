"""The stack of deploy/compose under a real engine, with the images that are there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose" / "docker-compose.yml"
SITES = ("site-1", "site-2", "site-3")
_CALL_S = 300.0


def compose_command() -> list[str]:
    """Compose v2 where the client has it, else the older program; skips without either or without an engine."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "version"], capture_output=True).returncode:
        pytest.skip("no container engine answers `docker version`; DOCKER_HOST names one that is elsewhere")
    for image in ("fedhds-server", "fedhds-client"):
        if subprocess.run([docker, "image", "inspect", image], capture_output=True).returncode:
            pytest.skip(f"there is no image {image}; make images")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0:
        return [docker, "compose"]
    older = shutil.which("docker-compose")
    if older is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    return [older]


class Stack:
    """One project: its containers, volumes and network, removed with it."""

    def __init__(self, command: list[str], project: str, environment: dict[str, str]) -> None:
        self._compose = [*command, "-p", project, "-f", str(COMPOSE)]
        self._environment = {**os.environ, "PUBLISH": "127.0.0.1:0", **environment}
        self._project = project
        self.model = Path(environment["MODELS"]) / Path(environment["MODEL"]).name

    def compose(self, *arguments: str, check: bool = True) -> str:
        """What `docker compose` prints."""
        return self._call([*self._compose, *arguments], check=check)

    def docker(self, *arguments: str) -> str:
        """What `docker` prints."""
        return self._call(["docker", *arguments], check=True)

    def up(self) -> None:
        """Starts everything; returns when the coordinator is healthy and the sites are started."""
        self.compose("up", "-d", "--no-build")

    def remove(self) -> None:
        """Ends everything and deletes its volumes."""
        self.compose("down", "--volumes", "--timeout", "0", check=False)

    def container(self, service: str) -> str:
        """The id of a service's container, running or not."""
        # Compose v2 lists only running ones without --all, which 1.29 does not know.
        label = f"label=com.docker.compose.service={service}"
        project = f"label=com.docker.compose.project={self._project}"
        (found,) = self.docker("ps", "-aq", "--filter", project, "--filter", label).split()
        return found

    def state(self, service: str) -> dict[str, Any]:
        """The engine's view of a service's container."""
        described: dict[str, Any] = json.loads(self.docker("inspect", self.container(service)))[0]
        return described

    def log(self, service: str) -> str:
        """What a service has printed in all its lives."""
        return self._call(["docker", "logs", self.container(service)], check=True)

    def rounds(self) -> int:
        """How many rounds have closed."""
        return self.log("coordinator").count(" closed with ")

    def wait_for_round(self, number: int, timeout_s: float = 180.0) -> None:
        """Returns once so many rounds have closed."""
        deadline = time.monotonic() + timeout_s
        while self.rounds() < number:
            assert time.monotonic() < deadline, f"no round {number}:\n{self._logs()}"
            time.sleep(0.2)

    def wait_for_exit(self, service: str, timeout_s: float = 300.0) -> int:
        """The exit status of a service that ends for good."""
        deadline = time.monotonic() + timeout_s
        while (described := self.state(service))["State"]["Status"] != "exited":
            assert time.monotonic() < deadline, f"{service} does not end:\n{self._logs()}"
            assert described["RestartCount"] <= 2, f"{service} ends again and again:\n{self._logs()}"
            time.sleep(0.2)
        return int(described["State"]["ExitCode"])

    def copy(self, service: str, path: str, to: Path) -> Path:
        """Copies a folder out of a service's container, running or not."""
        self.docker("cp", "-L", f"{self.container(service)}:{path}", str(to))
        return to

    def _logs(self) -> str:
        return self.compose("logs", "--no-color", "--tail", "40", check=False)

    def _call(self, command: list[str], *, check: bool) -> str:
        ran = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
            timeout=_CALL_S,
        )
        assert not check or ran.returncode == 0, f"{command} ends with {ran.returncode}:\n{ran.stdout}"
        return ran.stdout
