"""deploy/Dockerfile and deploy/compose without an engine: linters, and whether what they name exists."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fedhds.settings import load, settings_of, variable
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = DEPLOY / "compose"
BASE, GPU, MONITORING = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.monitoring.yml")
STACKS = [(BASE,), (BASE, GPU), (BASE, MONITORING), (BASE, GPU, MONITORING)]
SITES = ("site-1", "site-2", "site-3", "evaluator")


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    judged = subprocess.run([hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert judged.returncode == 0, judged.stdout + judged.stderr
    # It would be fetched from a registry before anything else.
    assert "# syntax" not in (DEPLOY / "Dockerfile").read_text()


@functools.cache
def merged(files: tuple[str, ...]) -> dict[str, Any]:
    """The stack as Compose sees it."""
    program = ["docker", "compose"]
    if not shutil.which("docker") or subprocess.run([*program, "version"], capture_output=True).returncode:
        program = ["docker-compose"]
        if not shutil.which(program[0]):
            pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    flags = [flag for file in files for flag in ("-f", str(COMPOSE / file))]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "MODEL": "base"}
    made = subprocess.run([*program, *flags, "config"], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
    # Of Compose v2, for keys that it has given up.
    assert "obsolete" not in made.stderr
    stack: dict[str, Any] = yaml.safe_load(made.stdout)
    return stack


@pytest.mark.parametrize("files", STACKS, ids=" ".join)
def test_settings_exist_and_are_accepted(files: tuple[str, ...]) -> None:
    services = merged(files)["services"]
    for name in ("coordinator", *SITES):
        model: type[BaseModel] = ServerSettings if name == "coordinator" else ClientSettings
        known = {variable(setting.name): setting.name for setting in settings_of(model)}
        values = {key: str(value) for key, value in services[name]["environment"].items() if key != "OMP_NUM_THREADS"}
        assert set(values) <= set(known)
        load(model, program=name, description="", arguments=[], environment=values)
        # It is for --http alone: gRPC keeps its TLS.
        names = {known[key] for key in values}
        assert "insecure" not in names or {"http", "tls_ca", "tls_cert", "tls_key"} <= names


@pytest.mark.parametrize("files", STACKS, ids=" ".join)
def test_what_services_name_exists(files: tuple[str, ...]) -> None:
    stack = merged(files)
    mounted = set()
    for name, service in stack["services"].items():
        assert set(service.get("depends_on", ())) <= set(stack["services"]), name
        for volume in service.get("volumes", ()):
            # 1.29 prints short ones as text.
            source = volume.split(":")[0] if isinstance(volume, str) else volume["source"]
            if source.startswith("/"):
                path = Path(source)
                assert path.exists() or path.parent.name in ("compose", "shards"), source
            else:
                mounted.add(source)
    assert mounted == set(stack["volumes"])


def test_nobody_but_the_certificates_service_is_root_or_may_write_to_its_image() -> None:
    for name, service in merged((BASE,))["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert ("user" in service) == (name == "certificates"), name


def test_only_the_certificates_service_sees_the_authority_and_parties_only_their_own_key() -> None:
    for name, service in merged((BASE,))["services"].items():
        volumes = [volume if isinstance(volume, str) else volume["source"] for volume in service["volumes"]]
        held = {volume.split(":")[0] for volume in volumes if volume.startswith(("tls-", "authority"))}
        if name != "certificates":
            assert held == {f"tls-{name}"}


def test_monitoring_scrapes_the_port_that_daemons_open_and_provisions_what_is_there() -> None:
    services = merged((BASE, MONITORING))["services"]
    scraped = yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for config in job["static_configs"] for target in config["targets"]}
    assert targets == {
        f"{name}:{services[name]['environment']['FEDHDS_HTTP'].rpartition(':')[2]}" for name in ("coordinator", *SITES)
    }
    inside = {
        parts[1]: Path(parts[0])
        for service in ("prometheus", "grafana")
        for volume in services[service]["volumes"]
        if len(parts := (volume.split(":") if isinstance(volume, str) else [volume["source"], volume["target"]])) > 1
    }
    for rules in yaml.safe_load((COMPOSE / "prometheus.yml").read_text())["rule_files"]:
        assert yaml.safe_load(inside[rules].read_text())["groups"]
    (provider,) = yaml.safe_load((COMPOSE / "grafana-dashboards.yml").read_text())["providers"]
    dashboard = Path(provider["options"]["path"]) / "fedhds.json"
    assert json.loads(inside[str(dashboard)].read_text())["panels"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == str(dashboard)
    (source,) = yaml.safe_load((COMPOSE / "grafana-datasource.yml").read_text())["datasources"]
    assert re.fullmatch("http://([a-z]+):9090", source["url"])[1] in services  # type: ignore[index]
