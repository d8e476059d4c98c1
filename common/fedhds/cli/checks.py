"""What `fedhds doctor` looks at: this installation, its GPU, a folder, the TLS files, and the way to a coordinator."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from fedhds import PROTOCOL_VERSIONS, __version__
from fedhds.errors import CoordinatorUnreachable, NotLeading, SettingsError, StorageError, coded

if TYPE_CHECKING:
    from fedhds.security.credentials import TlsFiles
    from fedhds.v2 import status_pb2

Answer = TypeVar("Answer")

STANDS_BY = "is reached and stands by"
# Which package tells that a program is meant to run here; the extra has the name of the program.
_ANCHORS = {"server": "sqlalchemy", "client": "torch"}
_DRIVER = Path("/proc/driver/nvidia/version")
_PROBE_BYTES = 1 << 20
_LITTLE_ROOM, _NO_ROOM = 1 << 30, 16 << 20
# Every answer of a coordinator waits for one.
_SLOW_FSYNC_S = 1.0
_EXPIRES_SOON = timedelta(days=30)
_ANSWER_S = 5.0
_ASKED = 3
_SKEW_S = 5.0
# grpc.health.v1: a request for all of the server is the empty message, SERVING as the one field of the answer is this.
_HEALTH, _SERVING = "/grpc.health.v1.Health/Check", b"\x08\x01"


class State(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    check: str
    state: State
    message: str
    """What was found and, unless all is well, what to do."""


def versions() -> Iterator[Finding]:
    """Python and the packages of each program against what fedhds requires."""
    try:
        required = [Requirement(line) for line in metadata.requires("fedhds") or []]
        pythons = metadata.metadata("fedhds")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Finding("versions", State.FAILED, "fedhds is not installed; pip install it, with [server] or [client]")
        return
    python = ".".join(map(str, sys.version_info[:3]))
    here = f"fedhds {__version__}, Python {python}"
    always = [requirement for requirement in required if _applies(requirement)]
    wrong = _unmet(always)
    if not SpecifierSet(pythons).contains(python):
        wrong.append(f"Python is {python}, where {pythons} is required")
    if wrong:
        yield Finding("versions", State.FAILED, f"{here}: {', '.join(wrong)}; pip install --upgrade fedhds")
    else:
        yield Finding("versions", State.OK, here)
    for extra, anchor in _ANCHORS.items():
        program, remedy = f"fedhds-{extra}", f"pip install 'fedhds[{extra}]'"
        if _installed(anchor) is None:
            yield Finding(program, State.SKIPPED, f"not installed here; where it is to run: {remedy}")
        elif wrong := _unmet([one for one in required if _applies(one, extra) and one not in always]):
            yield Finding(program, State.FAILED, f"{', '.join(wrong)}; {remedy}")
        else:
            yield Finding(program, State.OK, f"has the packages it needs, {anchor} {_installed(anchor)} among them")


def gpu() -> Finding:
    """What `fedhds-client --device auto` would compute on."""
    if importlib.util.find_spec("torch") is None:
        return Finding("gpu", State.SKIPPED, "torch is not installed here; a coordinator needs neither it nor a GPU")
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding("gpu", State.FAILED, f"torch cannot be imported ({error}); install the build for this machine")
    driver = re.search(r"\d+\.\d+[\d.]*", _DRIVER.read_text()) if _DRIVER.exists() else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available and driver is None:
        return Finding("gpu", State.SKIPPED, "there is none; fedhds-client computes on the CPU")
    if not available:
        build = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
        remedy = "update the driver or install torch for an older CUDA; in a container, give it the GPU"
        if torch.version.cuda is None:
            build, remedy = f"torch {torch.__version__} without CUDA", "install a build of torch with CUDA"
        why = "".join(f" ({' '.join(str(warning.message).split())})" for warning in caught[:1])
        return Finding(
            "gpu",
            State.WARNING,
            f"there is an NVIDIA driver {driver[0] if driver else ''}, but {build} finds no GPU{why}; {remedy}, else "
            "fedhds-client computes on the CPU",
        )
    gpus = []
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        try:
            free, whole = torch.cuda.mem_get_info(number)
            # A build without this GPU's architecture finds the GPU, and fails when it is to compute.
            torch.ones(64, 64).to(f"cuda:{number}").square().sum().item()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            return Finding("gpu", State.FAILED, f"{name} cannot compute ({reason}); install torch for it, or free it")
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16 of its own"
        gpus.append(f"{name}, {free / 2**30:.1f} of {whole / 2**30:.1f} GiB free, {bf16}")
    return Finding("gpu", State.OK, "; ".join(gpus) + f" (torch {torch.__version__})")


def disk(folder: Path) -> Finding:
    """Whether a run or state folder, or where it would be made, can be written and locked, and has room."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".fedhds-doctor-") as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.write(os.urandom(_PROBE_BYTES))
            probe.flush()
            begun = time.monotonic()
            os.fsync(probe.fileno())
            took = time.monotonic() - begun
        free = shutil.disk_usage(place).free
    except OSError as error:
        problem = f"cannot write to {place}: {error.strerror}; make it writable, or choose another folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = f"{place} is full ({error.strerror}); make room"
        return Finding("disk", State.FAILED, coded(StorageError(problem)))
    room = f"{place} has {free / 2**30:.1f} GiB left"
    if free < _NO_ROOM:
        return Finding("disk", State.FAILED, coded(StorageError(f"{room}; make room")))
    if free < _LITTLE_ROOM:
        return Finding("disk", State.WARNING, f"{room}, which a few adapters fill; make room")
    if took > _SLOW_FSYNC_S:
        return Finding(
            "disk", State.WARNING, f"{place} takes {took:.1f} s to make 1 MiB durable; use a faster, local disk"
        )
    return Finding("disk", State.OK, f"{room}; 1 MiB is durable in {1000 * took:.0f} ms")


def certificates(ca: Path | None, cert: Path | None, key: Path | None) -> tuple[Finding, TlsFiles | None]:
    """The TLS files, and what is wrong with them; files that cannot serve are None."""
    from fedhds.security.credentials import TlsFiles, own_identity
    from fedhds.security.pki import hosts_of

    try:
        files = TlsFiles.from_settings(ca, cert, key)
    except SettingsError as error:
        return Finding("certificates", State.FAILED, coded(error)), None
    if files is None:
        return Finding("certificates", State.SKIPPED, "none; give --tls-ca, --tls-cert and --tls-key"), None
    identity = own_identity(files)
    # One of several authorities is enough; of the certificates that lead to it, all are needed.
    end, authority_end = min(_ends(files.cert)), max(_ends(files.ca))
    ends = [(files.ca, authority_end, "make a new authority and issue every certificate again")]
    if end < authority_end:
        # One that ends with its authority cannot be renewed.
        ends.insert(0, (files.cert, end, "have it renewed with `fedhds certs issue ... --renew`"))
    problems = [
        f"{path} expires on {last:%Y-%m-%d %H:%M} UTC, {remedy} before"
        for path, last, remedy in ends
        if last - datetime.now(UTC) < _EXPIRES_SOON
    ]
    # The group may read it: Kubernetes gives a pod its secrets so.
    if files.key.stat().st_mode & 0o027:
        problems.append(f"{files.key} is open to other users of this machine, chmod 600 {files.key}")
    if problems:
        return Finding("certificates", State.WARNING, "; ".join(problems)), files
    text = f"{files.cert} is of the {identity.role} {identity.name}, valid until {min(end, authority_end):%Y-%m-%d}"
    hosts = ", ".join(hosts_of(files.cert))
    return Finding("certificates", State.OK, text + f", for the hosts {hosts}" * bool(hosts)), files


def _ends(path: Path) -> list[datetime]:
    from cryptography import x509

    return [one.not_valid_after_utc for one in x509.load_pem_x509_certificates(path.read_bytes())]


def coordinator(target: str, files: TlsFiles | None) -> Iterator[Finding]:
    """Whether the coordinator at HOST:PORT can be reached and talked to; if it leads, whether clocks agree."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    from fedhds.cli.connection import LARGE_ANSWERS
    from fedhds.grpc_errors import error_of, older_coordinator
    from fedhds.runtime.proxies import proxy_to
    from fedhds.security.credentials import diagnose_failure, diagnose_handshake, probe_credentials
    from fedhds.settings import host_and_port
    from fedhds.v2 import status_pb2
    from fedhds.v2 import status_pb2_grpc as status_rpc

    check = f"server {target}"
    # What only a proxy reaches is not looked for directly, unless gRPC fails, too.
    proxied = proxy_to(host_and_port(target)[0])
    if not proxied and (reason := diagnose_handshake(target, files, _ANSWER_S)):
        yield Finding(check, State.FAILED, coded(CoordinatorUnreachable(reason)))
        return
    if files:
        channel = grpc.secure_channel(target, probe_credentials(files), options=LARGE_ANSWERS)
    else:
        channel = grpc.insecure_channel(target, options=LARGE_ANSWERS)
    serving: bool | None = None
    with channel:
        try:
            serving = channel.unary_unary(_HEALTH)(b"", timeout=_ANSWER_S) == _SERVING
            # The journal has no such line.
            request, ask = (
                status_pb2.GetStatusRequest(journal_after=2**63),
                status_rpc.OperationsStub(channel).GetStatus,
            )
            answers = [_timed(lambda: ask(request, timeout=_ANSWER_S)) for _ in range(_ASKED)]
        except grpc.RpcError as error:
            known = error_of(error)
            if isinstance(known, NotLeading):
                yield Finding(check, State.OK, STANDS_BY)
            elif serving is not None and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                yield Finding(check, State.FAILED, coded(older_coordinator(target)))
            else:
                reason = error.details() or error.code().name
                problem = f"{target} does not answer as a coordinator: {reason}; look at its log"
                if not known and proxied:
                    problem = diagnose_failure(target, files, reason, _ANSWER_S) or problem
                yield Finding(check, State.FAILED, coded(known or CoordinatorUnreachable(problem)))
            return
    answer, sent, took = min(answers, key=lambda one: one[2])
    yield _spoken(check, answer, serving, took)
    if answer.now:
        yield _skew(answer.now - (sent + took / 2), took / 2)


def _spoken(check: str, answer: status_pb2.GetStatusResponse, serving: bool, took: float) -> Finding:
    speaks = set(answer.protocol_versions) or set(PROTOCOL_VERSIONS)
    if speaks.isdisjoint(PROTOCOL_VERSIONS):
        return Finding(
            check,
            State.FAILED,
            f"speaks protocol {sorted(speaks)}, this fedhds {__version__} {sorted(PROTOCOL_VERSIONS)}; install version "
            f"{answer.fedhds_version} here",
        )
    if not serving:
        return Finding(check, State.WARNING, "leads, but is not ready; its log and /readyz say why")
    version = answer.fedhds_version or "of an older version"
    return Finding(check, State.OK, f"leads run {answer.run_id}, fedhds {version}, and answers in {1000 * took:.0f} ms")


def _skew(ahead_s: float, error_s: float) -> Finding:
    """Judges how far the coordinator's clock is ahead of this machine's."""
    from fedhds.security.pki import BACKDATE

    least = abs(ahead_s) - error_s
    text = f"this machine's clock is {abs(ahead_s):.2f} s {'behind' if ahead_s > 0 else 'ahead of'} the coordinator's"
    text += f" (± {max(error_s, 0.01):.2f} s)"
    if least > BACKDATE.total_seconds():
        return Finding(
            "clock", State.FAILED, f"{text}: new certificates would not be valid yet; set both clocks by NTP"
        )
    if least > _SKEW_S:
        return Finding("clock", State.WARNING, f"{text}; set both clocks by NTP")
    return Finding("clock", State.OK, text)


def _timed(ask: Callable[[], Answer]) -> tuple[Answer, float, float]:
    """An answer, the wall time at which it was asked for, and the seconds that it took."""
    sent, begun = time.time(), time.monotonic()
    answer = ask()
    return answer, sent, time.monotonic() - begun


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _unmet(required: list[Requirement]) -> list[str]:
    """Every requirement whose package is missing or of another version, and what is wrong."""
    wrong = []
    for requirement in required:
        version = _installed(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, where {requirement.specifier} is required")
    return wrong


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
