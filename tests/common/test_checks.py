"""What `fedhds doctor` finds: real files, file systems, certificates and servers, each with something wrong."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

import grpc
import pytest
from packaging.requirements import Requirement

from fedhds.cli import checks
from fedhds.cli.checks import Finding, State
from fedhds.cli.doctor import _findings
from fedhds.security import pki
from fedhds.security.credentials import TlsFiles, server_credentials
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.v2 import status_pb2
from fedhds.v2 import status_pb2_grpc as status_rpc
from tests.support.tls_servers import issue_dated


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return init_authority(tmp_path / "certs").parent


@pytest.fixture
def site(folder: Path) -> TlsFiles:
    return issue(folder, "hospital-a", role=Role.SITE)


def judged(files: TlsFiles, **others: Path) -> Finding:
    """The finding about `files`, some of them in the place of which are `others`."""
    finding, usable = checks.certificates(
        others.get("ca", files.ca), others.get("cert", files.cert), others.get("key", files.key)
    )
    assert (usable is None) is (finding.state is State.FAILED)
    return finding


def test_certificates_that_are_well_say_whose_they_are(site: TlsFiles) -> None:
    finding = judged(site)
    assert finding.state is State.OK
    assert "is of the site hospital-a, valid until 20" in finding.message


def test_a_coordinators_certificate_says_for_which_hosts_it_is(folder: Path) -> None:
    files = issue(folder, "coordinator", role=Role.COORDINATOR, hosts=["fed.example.org", "10.0.0.7"])
    assert judged(files).message.endswith(", for the hosts fed.example.org, 10.0.0.7")


def test_no_certificates_are_nothing_to_check() -> None:
    finding, files = checks.certificates(None, None, None)
    assert (finding.state, files) == (State.SKIPPED, None)


def test_certificates_that_cannot_serve_fail(
    tmp_path: Path, folder: Path, site: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    expired = issue_dated(monkeypatch, folder, "old", Role.SITE, -2, -1)
    early = issue_dated(monkeypatch, folder, "early", Role.SITE, 1, 2)
    elsewhere = init_authority(tmp_path / "elsewhere")
    other = issue(folder, "hospital-b", role=Role.SITE)
    for finding, words in (
        (judged(expired), "expired on"),
        (judged(early), "check this machine's clock"),
        (judged(site, ca=elsewhere), "not signed by the authority"),
        (judged(site, key=other.key), "does not belong to the certificate"),
        (judged(site, key=tmp_path / "gone"), "cannot be read"),
        (checks.certificates(site.ca, site.cert, None)[0], "go together"),
    ):
        assert finding.state is State.FAILED
        assert re.search(rf"{words}.*\[FH11\]$", finding.message), finding


def test_certificates_that_will_not_serve_for_long_or_are_open_to_others_are_a_warning(
    tmp_path: Path, folder: Path, site: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = judged(issue_dated(monkeypatch, folder, "late", Role.SITE, -1, 20))
    assert finding.state is State.WARNING
    assert "late.crt expires on" in finding.message
    assert "--renew" in finding.message
    authority = init_authority(tmp_path / "brief", days=10).parent
    with monkeypatch.context() as patch:
        # A certificate that outlives its authority, as other tools make them.
        patch.setattr(pki, "min", lambda wanted, _: wanted, raising=False)
        finding = judged(issue(authority, "a", role=Role.SITE, days=100))
    assert finding.state is State.WARNING
    assert "ca.crt expires on" in finding.message
    assert "--renew" not in finding.message
    finding = judged(issue(authority, "b", role=Role.SITE))
    assert "ca.crt expires on" in finding.message
    assert "--renew" not in finding.message
    site.key.chmod(0o644)
    finding = judged(site)
    assert (finding.state, f"chmod 600 {site.key}" in finding.message) == (State.WARNING, True)
    late = issue_dated(monkeypatch, folder, "later", Role.SITE, -1, 20)
    late.key.chmod(0o644)
    assert re.search("later.crt expires on .*; .*chmod 600", judged(late).message)
    site.key.chmod(0o440)
    assert judged(site).state is State.OK


@pytest.fixture
def file_system(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=18m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    finding = checks.disk(tmp_path / "not" / "made" / "yet")
    assert finding.state in (State.OK, State.WARNING)
    assert str(tmp_path) in finding.message
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_read_only_disk_fails(file_system: Path) -> None:
    assert checks.disk(file_system).state is State.WARNING
    (file_system / "filler").write_bytes(bytes(8 << 20))
    assert re.search(r"0\.0 GiB left; make room \[FH50\]$", checks.disk(file_system).message)
    with contextlib.suppress(OSError), (file_system / "more").open("wb") as filler:
        while True:
            filler.write(bytes(1 << 16))
    finding = checks.disk(file_system)
    assert finding.state is State.FAILED
    assert re.search(r"small is full \(No space left on device\); make room \[FH50\]$", finding.message)
    subprocess.run(["mount", "-o", "remount,ro", str(file_system)], check=True)
    finding = checks.disk(file_system)
    assert finding.state is State.FAILED
    assert "Read-only file system" in finding.message


def test_a_folder_that_is_a_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert checks.disk(path).state is State.FAILED


def versions() -> dict[str, Finding]:
    return {finding.check: finding for finding in checks.versions()}


def test_what_is_installed_here_is_as_required() -> None:
    assert {finding.state for finding in versions().values()} == {State.OK}


def test_every_requirement_of_a_program_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the packages that tell of a program are here, and they are too old."""
    anchors = {"server": "sqlalchemy", "client": "torch"}

    def version(package: str) -> str:
        if package not in anchors.values():
            raise metadata.PackageNotFoundError(package)
        return "0.1"

    monkeypatch.setattr(metadata, "version", version)
    expected: dict[str, set[str]] = {"versions": set(), "fedhds-server": set(), "fedhds-client": set()}
    for line in metadata.requires("fedhds") or []:
        requirement = Requirement(line)
        check = "versions"
        if extra := re.search("extra == [\"'](\\w+)", line):
            check = f"fedhds-{extra[1]}"
        if check in expected:
            old = f"is 0.1, where {requirement.specifier} is required"
            problem = old if requirement.name in anchors.values() else "is missing"
            expected[check].add(f"{requirement.name} {problem}")
    found = {
        check: set(re.findall(r"[\w-]+ is (?:missing|0\.1, where \S+ is required)", finding.message))
        for check, finding in versions().items()
    }
    assert found == expected


@pytest.mark.parametrize(
    ("version", "bounds", "meets"),
    [
        ("5.0", ">=5,<6", True),
        ("5.23.0", "<6,>=5", True),
        ("6.0.0", "<6,>=5", False),
        ("2.13.0+cpu", ">=2.6", True),
        ("6.31.0", ">=6.31.1", False),
        ("2025.10", ">=2025.9", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_by_their_numbers(
    monkeypatch: pytest.MonkeyPatch, version: str, bounds: str, meets: bool
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: version)
    expected = [] if meets else [f"package is {version}, where {Requirement(f'package{bounds}').specifier} is required"]
    assert checks._unmet([Requirement(f"package{bounds}")]) == expected


def test_a_package_of_another_version_fails_for_the_program_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("peft", "0.9.1"), ("protobuf", "5.0")):
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = versions()
    assert {check: finding.state for check, finding in found.items()} == {
        "versions": State.FAILED,
        "fedhds-server": State.OK,
        "fedhds-client": State.FAILED,
    }
    assert "protobuf is 5.0, where >=6.31.1 is required" in found["versions"].message
    assert "peft is 0.9.1, where " in found["fedhds-client"].message


def test_a_coordinators_host_has_no_torch_and_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version

    def version(package: str) -> str:
        if package == "torch":
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setitem(sys.modules, "torch", None)
    found = versions()
    assert [found[check].state for check in ("fedhds-server", "fedhds-client")] == [State.OK, State.SKIPPED]
    assert "pip install 'fedhds[client]'" in found["fedhds-client"].message
    assert checks.gpu() == Finding(
        "gpu", State.SKIPPED, "torch is not installed here; a coordinator needs neither it nor a GPU"
    )


def test_a_driver_that_torch_makes_nothing_of_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch finds a GPU here")
    monkeypatch.setattr(checks, "_DRIVER", tmp_path / "version")
    assert checks.gpu().state is State.SKIPPED
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n")
    finding = checks.gpu()
    assert finding.state is State.WARNING
    assert "driver 550.54.15" in finding.message


@pytest.mark.parametrize("computes", [True, False])
def test_a_gpu_is_named_with_its_memory_once_it_has_computed(monkeypatch: pytest.MonkeyPatch, computes: bool) -> None:
    """As torch tells of GPUs, on a machine without one; only the sum is done, on the CPU."""
    import torch

    def to(tensor: torch.Tensor, device: str) -> torch.Tensor:
        assert device == "cuda:0"
        if not computes:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for ...")
        return tensor

    told = {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (70 << 30, 80 << 30),
        "is_bf16_supported": True,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.Tensor, "to", to)
    finding = checks.gpu()
    if computes:
        assert finding.state is State.OK
        assert finding.message.startswith("NVIDIA H100 80GB HBM3, 70.0 of 80.0 GiB free, bf16 (torch ")
    else:
        assert finding.state is State.FAILED
        assert "no kernel image is available for execution on the device)" in finding.message


class Coordinator(status_rpc.OperationsServicer):
    """A coordinator of some version, as far as the doctor asks it."""

    def __init__(self, ahead_s: float = 0.0, protocol: int = 2, *, serves: bool = True) -> None:
        self.ahead_s, self.protocol, self.serves = ahead_s, protocol, serves

    async def GetStatus(  # noqa: N802
        self, request: status_pb2.GetStatusRequest, context: object
    ) -> status_pb2.GetStatusResponse:
        return status_pb2.GetStatusResponse(
            run_id="r1", now=time.time() + self.ahead_s, fedhds_version="9.8", protocol_versions=[self.protocol]
        )


@asynccontextmanager
async def listening(coordinator: Coordinator, files: TlsFiles | None = None) -> AsyncIterator[str]:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    status = health_pb2.HealthCheckResponse
    server, own = grpc.aio.server(), health.aio.HealthServicer()
    await own.set("", status.SERVING if coordinator.serves else status.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(own, server)
    status_rpc.add_OperationsServicer_to_server(coordinator, server)
    address = "localhost:0"
    port = server.add_secure_port(address, server_credentials(files)) if files else server.add_insecure_port(address)
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(None)


async def asked(target: str, files: TlsFiles | None = None) -> dict[str, Finding]:
    found = await asyncio.to_thread(lambda: list(checks.coordinator(target, files)))
    return {finding.check.partition(" ")[0]: finding for finding in found}


@pytest.mark.parametrize("role", [Role.SITE, Role.OPERATOR, Role.COORDINATOR])
async def test_a_coordinator_is_reached_with_any_certificate_of_its_federation(folder: Path, role: Role) -> None:
    own = issue(folder, "coordinator", role=Role.COORDINATOR)
    files = own if role is Role.COORDINATOR else issue(folder, "somebody", role=role)
    async with listening(Coordinator(), own) as target:
        found = await asked(target, files)
    assert [found["server"].state, found["clock"].state] == [State.OK, State.OK], found
    assert re.search(r"leads run r1, fedhds 9\.8, and answers in \d+ ms$", found["server"].message)


async def test_another_federations_certificate_is_refused(folder: Path, tmp_path: Path) -> None:
    stranger = issue(init_authority(tmp_path / "elsewhere").parent, "hospital-a", role=Role.SITE)
    async with listening(Coordinator(), issue(folder, "coordinator", role=Role.COORDINATOR)) as target:
        found = await asked(target, stranger)
    assert list(found) == ["server"]
    assert re.search(r"not from the authority in .*\[FH52\]$", found["server"].message)


@pytest.mark.parametrize(
    ("ahead_s", "state", "words"),
    [
        (3, State.OK, "behind"),
        (60, State.WARNING, "this machine's clock is [56]\\d.* s behind the coordinator's .*NTP"),
        (-60, State.WARNING, "ahead of"),
        (7200, State.FAILED, "new certificates would not be valid yet"),
    ],
)
async def test_clocks_are_compared(ahead_s: float, state: State, words: str) -> None:
    async with listening(Coordinator(ahead_s)) as target:
        found = await asked(target)
    assert found["server"].state is State.OK
    assert found["clock"].state is state, found
    assert re.search(words, found["clock"].message), found


async def test_a_coordinator_that_is_not_ready_or_speaks_another_protocol() -> None:
    async with listening(Coordinator(serves=False)) as target:
        assert (await asked(target))["server"].state is State.WARNING
    async with listening(Coordinator(protocol=7)) as target:
        finding = (await asked(target))["server"]
    assert finding.state is State.FAILED
    assert "install version 9.8 here" in finding.message


async def test_something_else_than_a_coordinator_fails() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("localhost:0")
    await server.start()
    try:
        finding = (await asked(f"localhost:{port}"))["server"]
    finally:
        await server.stop(None)
    assert finding.state is State.FAILED
    assert "does not answer as a coordinator" in finding.message


async def test_a_coordinator_of_an_older_protocol_is_said_to_be_one() -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server, own = grpc.aio.server(), health.aio.HealthServicer()
    await own.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(own, server)
    port = server.add_insecure_port("localhost:0")
    await server.start()
    try:
        finding = (await asked(f"localhost:{port}"))["server"]
    finally:
        await server.stop(None)
    assert finding.state is State.FAILED
    assert re.search(rf"localhost:{port} does not know protocol 2 .*install.* \[FH20\]$", finding.message)


async def test_a_port_where_nothing_listens_fails() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    finding = (await asked(f"localhost:{port}"))["server"]
    assert finding.state is State.FAILED
    assert re.search(r"nothing listens on localhost:\d+;.* \[FH52\]$", finding.message)


def test_a_federation_that_nobody_leads_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def standing_by(target: str, _: object) -> Iterator[Finding]:
        yield Finding(f"server {target}", State.OK, checks.STANDS_BY)

    monkeypatch.setattr(checks, "coordinator", standing_by)
    warned = next(found for found in _findings("a:1,b:2", None, None, None, None) if found.check == "server")
    assert (warned.state, "none of them leads" in warned.message) == (State.WARNING, True)
