"""deploy/kubernetes: valid for three versions, and everything that a manifest names exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from fedhds.settings import load, settings_of, variable
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.35", "1.36", "1.37")
# Read by others than fedhds: botocore, the linear algebra.
FOREIGN = re.compile("AWS_[A-Z_]+|OMP_NUM_THREADS")

Manifest = dict[str, Any]

# Components render nothing by themselves: they are put on something here.
COMPOSED = {
    "gpu-site": (["../site"], ["../gpu"]),
    "standby-with-metrics": (["../standby"], ["../metrics"]),
    "example-with-metrics": (["../example"], ["../metrics"]),
}


@cache
def rendered(name: str, folder: Path = FOLDER) -> list[Manifest]:
    """All manifests of an overlay."""
    kubectl, kustomize = shutil.which("kubectl"), shutil.which("kustomize")
    if kubectl:
        command = [kubectl, "kustomize"]
    elif kustomize:
        command = [kustomize, "build"]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    made = subprocess.run([*command, str(folder / name)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "deprecated" not in made.stderr.lower(), made.stderr
    return [manifest for manifest in yaml.safe_load_all(made.stdout) if manifest]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """deploy/kubernetes with an overlay for every component."""
    folder = tmp_path_factory.mktemp("kubernetes")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    for name, (resources, components) in COMPOSED.items():
        (folder / name).mkdir()
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": resources,
            "components": components,
        }
        (folder / name / "kustomization.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(params=["coordinator", "site", "standby", "example", *COMPOSED])
def manifests(request: pytest.FixtureRequest, folder: Path) -> list[Manifest]:
    return rendered(request.param, folder)


def named(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in manifests if manifest["kind"] == kind}


def workloads(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Every StatefulSet and Job with its pod."""
    found = [manifest for manifest in manifests if manifest["kind"] in ("StatefulSet", "Job")]
    assert found
    for manifest in found:
        yield manifest, manifest["spec"]["template"]


@pytest.mark.parametrize(
    "version", [*(pytest.param(version, marks=pytest.mark.slow) for version in VERSIONS[:-1]), VERSIONS[-1]]
)
def test_manifests_are_valid(manifests: list[Manifest], version: str) -> None:
    # In the process: the command takes an unknown kind for a warning, and ends with 0.
    import kubernetes_validate

    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_mistake_and_an_unknown_kind_are_found() -> None:
    import kubernetes_validate

    good = named(rendered("coordinator"), "ServiceAccount")["coordinator"]
    for bad in (good | {"automountToken": False}, good | {"kind": "ServiceAcount"}):
        with pytest.raises((kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError)):
            kubernetes_validate.validate(bad, VERSIONS[-1], strict=True)


def test_selectors_find_pods_and_ports_exist(manifests: list[Manifest]) -> None:
    pods = [pod for _, pod in workloads(manifests)]

    def selected(labels: dict[str, str]) -> list[Manifest]:
        assert labels
        return [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]

    def ports_of(pod: Manifest) -> set[str | int]:
        ports = [port for container in pod["spec"]["containers"] for port in container.get("ports", ())]
        return {port["name"] for port in ports} | {port["containerPort"] for port in ports}

    for service in named(manifests, "Service").values():
        (pod,) = selected(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports_of(pod)
    for policy in named(manifests, "NetworkPolicy").values():
        (pod,) = selected(policy["spec"]["podSelector"]["matchLabels"])
        opened = [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        assert set(opened) <= ports_of(pod)
        assert bool(opened) == bool(ports_of(pod))
    for budget in named(manifests, "PodDisruptionBudget").values():
        assert selected(budget["spec"]["selector"]["matchLabels"])
    # Every pod is behind a policy.
    for pod in pods:
        policies = named(manifests, "NetworkPolicy").values()
        assert any(pod in selected(policy["spec"]["podSelector"]["matchLabels"]) for policy in policies)
    for stateful in named(manifests, "StatefulSet").values():
        assert stateful["spec"]["serviceName"] in named(manifests, "Service")
        assert selected(stateful["spec"]["selector"]["matchLabels"])


def test_what_pods_refer_to_exists(manifests: list[Manifest]) -> None:
    claims, maps = named(manifests, "PersistentVolumeClaim"), named(manifests, "ConfigMap")
    for workload, pod in workloads(manifests):
        spec = pod["spec"]
        templates = workload["spec"].get("volumeClaimTemplates", ())
        volumes = {volume["name"]: volume for volume in spec["volumes"]} | {
            template["metadata"]["name"]: template for template in templates
        }
        assert spec["serviceAccountName"] in named(manifests, "ServiceAccount")
        for volume in spec["volumes"]:
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "secret" in volume:
                assert {"ca.crt", "tls.crt", "tls.key"} <= documented_secrets()[volume["secret"]["secretName"]]
        (container,) = spec["containers"]
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == set(volumes)
        for source in container["envFrom"]:
            if "secretRef" in source:
                assert source["secretRef"]["name"] in documented_secrets()
            else:
                assert source["configMapRef"]["name"] in maps
        # The files of TLS are keys of the secret, where it is mounted.
        (tls,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "tls")
        files = {item["value"] for item in container["env"] if item["name"].startswith("FEDHDS_TLS_")}
        assert files == {f"{tls}/ca.crt", f"{tls}/tls.crt", f"{tls}/tls.key"}
    used = {source["configMapRef"]["name"] for _, pod in workloads(manifests) for source in sources_of(pod)}
    assert used == set(maps)


def sources_of(pod: Manifest) -> list[Manifest]:
    return [source for source in pod["spec"]["containers"][0]["envFrom"] if "configMapRef" in source]


def test_settings_exist_and_are_accepted(manifests: list[Manifest]) -> None:
    maps = named(manifests, "ConfigMap")
    for workload, pod in workloads(manifests):
        model: type[BaseModel] = ServerSettings if workload["kind"] == "StatefulSet" else ClientSettings
        (container,) = pod["spec"]["containers"]
        assert container["name"] == ("coordinator" if model is ServerSettings else "site")
        values = {item["name"]: item.get("value", "") for item in container["env"]}
        for source in sources_of(pod):
            values |= maps[source["configMapRef"]["name"]]["data"]
        known = {variable(setting.name): setting.name for setting in settings_of(model)}
        ours = {name: value for name, value in values.items() if not FOREIGN.fullmatch(name)}
        assert set(ours) <= set(known)
        load(model, program=container["name"], description="", arguments=[], environment=ours)
        # It is for --http alone: gRPC keeps its TLS.
        names = {known[name] for name, value in ours.items() if value}
        assert "insecure" not in names or {"http", "tls_ca", "tls_cert", "tls_key"} <= names


def test_pods_meet_the_restricted_profile_and_hold_no_token(manifests: list[Manifest]) -> None:
    for _, pod in workloads(manifests):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_a_coordinator_is_probed_by_a_command_that_exists(manifests: list[Manifest]) -> None:
    import typer

    from fedhds_server.health_command import health

    app = typer.Typer()
    app.command()(health)
    command: Any = typer.main.get_command(app)
    for stateful in named(manifests, "StatefulSet").values():
        (container,) = stateful["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            words = container[probe]["exec"]["command"]
            assert words[:2] == ["fedhds", "health"]
            command.make_parser(typer.Context(command)).parse_args(words[2:])
        assert "--live" in container["livenessProbe"]["exec"]["command"]


@pytest.mark.parametrize("name", [name for name in COMPOSED if name.endswith("metrics")])
def test_metrics_are_for_the_monitoring_namespace_alone(folder: Path, name: str) -> None:
    manifests = rendered(name, folder)
    for _, pod in workloads(manifests):
        (container,) = pod["spec"]["containers"]
        (address,) = (item["value"] for item in container["env"] if item["name"] == "FEDHDS_HTTP")
        (port,) = (port["containerPort"] for port in container["ports"] if port["name"] == "http")
        assert address == f"0.0.0.0:{port}"
    rules = [
        rule
        for policy in named(manifests, "NetworkPolicy").values()
        for rule in policy["spec"]["ingress"]
        if {"protocol": "TCP", "port": "http"} in rule["ports"]
    ]
    assert len(rules) == len(list(workloads(manifests)))
    only = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    assert all(rule["from"] == [only] and len(rule["ports"]) == 1 for rule in rules)


def test_a_standby_is_one_of_two_and_a_drain_takes_one_at_a_time() -> None:
    manifests = rendered("standby")
    stateful = named(manifests, "StatefulSet")["coordinator"]
    assert stateful["spec"]["replicas"] == 2
    assert named(manifests, "PodDisruptionBudget")["coordinator"]["spec"]["maxUnavailable"] == 1
    assert documented_secrets()["coordinator-store"] >= {"FEDHDS_STORE"}


def documented_secrets() -> dict[str, set[str]]:
    """Names and keys of the secrets that docs/kubernetes.md makes."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8").replace("\\\n", " ")
    made = re.findall(r"create secret generic (\S+)(.*)", text)
    return {name: set(re.findall(r"--from-(?:file|literal)=([A-Za-z_.]+)=", rest)) for name, rest in made}
