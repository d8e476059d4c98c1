"""One run: a coordinator, the sites and the evaluators as real daemons, and what came of them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from fedhds import __version__
from fedhds.cli.connection import call
from fedhds.errors import CoordinatorUnreachable
from fedhds.runtime.files import replace_file
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.v2 import status_pb2
from fedhds_server.simulation.daemons import Daemons, SimulationError
from fedhds_server.simulation.shards import Shards
from fedhds_server.simulation.sweep import Point

_LOOK_S = 0.5
_OPERATOR = "operator"
_ENDS = ("completed", "stopped", "failed")

Watch = Callable[[status_pb2.GetStatusResponse], None]


def key_of(point: Point, shards: Shards) -> str:
    """SHA-256 over what decides the result of a run: the coordinator's settings and the bytes of all shards."""
    spec = point.settings.coordinator.model_dump_json(exclude={"run_folder", "keep_updates"})
    return hashlib.sha256(f"{spec}\n{shards.digest}\n{point.settings.tls}".encode()).hexdigest()


def run(point: Point, shards: Shards, folder: Path, watch: Watch) -> dict[str, Any]:
    """Runs it in `folder`, or goes on with what an interruption left there; the line of its result.

    `watch` sees the status twice a second. Raises SimulationError when a daemon fails.
    """
    record = _Record(folder)
    # The coordinator of an earlier start listened elsewhere.
    (folder / "run" / "address").unlink(missing_ok=True)
    if not _over(folder):
        processes = len(shards.sites) if point.settings.tls else min(point.settings.processes, len(shards.sites))
        threads = max(1, (os.cpu_count() or 1) // processes)
        with record.timed(), Daemons(folder / "logs", threads) as daemons:
            _federation(point, shards, folder, daemons, processes, watch)
    if not _over(folder):
        raise SimulationError(f"the coordinator ended before its run; the logs are in {folder / 'logs'}")
    return _line(point, folder, record)


def _federation(point: Point, shards: Shards, folder: Path, daemons: Daemons, processes: int, watch: Watch) -> None:
    certificates = folder / "certs" if point.settings.tls else None
    if certificates and not certificates.exists():
        init_authority(certificates)
        issue(certificates, "coordinator", role=Role.COORDINATOR, hosts=("localhost", "127.0.0.1"))
        issue(certificates, _OPERATOR, role=Role.OPERATOR)
        for name in (*shards.sites, *shards.evaluators):
            issue(certificates, name, role=Role.SITE)
    tls = _tls(certificates)
    config, values = folder / "coordinator.yaml", _coordinator_values(point, shards)
    replace_file(config, yaml.safe_dump(values))
    feature_model = values.get("feature_model")
    allowed = (f"--allow-feature-model={feature_model}",) if feature_model else ()
    run_folder = folder / "run"
    flags = ("--listen=127.0.0.1:0", f"--run-folder={run_folder}")
    daemons.start("coordinator", "fedhds-server", f"--config={config}", *flags, *tls("coordinator"))
    server = daemons.address("coordinator", run_folder / "address")
    sites = sorted(shards.sites)
    for index in range(processes):
        names = sites[index::processes]
        name = names[0] if processes == len(sites) else f"sites-{index}"
        data = ("--data", *(shards.sites[site] for site in names), "--allow-exact-kmeans-sums")
        if point.settings.target_data and not index:
            data = (*data, f"--target-data={point.settings.target_data}")
        identity = tls(name) or ("--name", *names)
        daemons.start(name, "fedhds-client", f"--server={server}", *data, *identity, *allowed, *_home(folder, name))
    for name, path in shards.evaluators.items():
        identity = tls(name) or ("--name", name)
        rows = (f"--eval-data={path}", "--inference-batch-size=32")
        daemons.start(name, "fedhds-client", f"--server={server}", *rows, *identity, *allowed, *_home(folder, name))
    keys = (
        [certificates / f for f in ("ca.crt", f"{_OPERATOR}.crt", f"{_OPERATOR}.key")] if certificates else [None] * 3
    )
    while daemons.running():
        # It ends before its sites do.
        with suppress(CoordinatorUnreachable):
            watch(call("GetStatus", status_pb2.GetStatusRequest(), server, *keys))
        time.sleep(_LOOK_S)


def _coordinator_values(point: Point, shards: Shards) -> dict[str, Any]:
    """The coordinator's settings as they were given, in the form of its YAML file."""
    own = type(point.settings).model_fields.keys()
    values = {name: value for name, value in point.given.items() if name not in own}
    return values | {"min_sites": str(len(shards.sites)), "min_evaluators": str(len(shards.evaluators))}


def _tls(certificates: Path | None) -> Callable[[str], tuple[str, ...]]:
    def flags(name: str) -> tuple[str, ...]:
        if certificates is None:
            return ()
        files = (("ca", "ca.crt"), ("cert", f"{name}.crt"), ("key", f"{name}.key"))
        return tuple(f"--tls-{kind}={certificates / file}" for kind, file in files)

    return flags


def _home(folder: Path, name: str) -> tuple[str, ...]:
    # What a simulation releases leaves nobody.
    return (
        f"--state={folder / name / 'state'}",
        f"--out={folder / name / 'adapter'}",
        f"--ledger={folder / name / 'ledger.db'}",
    )


def _over(folder: Path) -> bool:
    """Whether the run has ended: the report is written with every save."""
    report = folder / "run" / "report.json"
    return report.exists() and json.loads(report.read_text(encoding="utf-8"))["phase"] in _ENDS


class _Record:
    """How often a run was started, and for how many seconds it ran, over all starts."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "simulation.json"
        content = json.loads(self._path.read_text()) if self._path.exists() else {}
        self.starts = int(content.get("starts", 0))
        self.seconds = float(content.get("seconds", 0))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """One start; its time counts also when it is interrupted, but for a kill."""
        self.starts += 1
        self._save()
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began
            self._save()

    def _save(self) -> None:
        replace_file(self._path, json.dumps({"starts": self.starts, "seconds": self.seconds}))


def _line(point: Point, folder: Path, record: _Record) -> dict[str, Any]:
    """`result` follows from the settings and the data alone, `measured` from this machine, too."""
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    if report["phase"] != "completed":
        raise SimulationError(f"the run {report['phase']}: {report['message']}")
    evaluations: dict[str, dict[str, Any]] = {}
    for text in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(text)
        if entry["event"] == "evaluation":
            evaluations.setdefault(entry["site"], {})[str(entry["round_number"])] = entry["metrics"]
    adapter = folder / "run" / "checkpoint" / "adapter_model.safetensors"
    return {
        "settings": dict(point.swept),
        "spec": report["spec"],
        "result": {
            "rounds": len(report["closed_rounds"]),
            "sites": sum(not site["evaluates"] or site["rows"] != "0" for site in report["sites"]),
            "pool_rows": int(report["pool_rows"]),
            "trained_rows": int(report["trained_rows"]),
            "row_steps": sum(int(closed["samples"]) for closed in report["closed_rounds"]),
            "evaluations": dict(sorted(evaluations.items())),
            "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        },
        "measured": {
            "seconds": round(record.seconds, 1),
            "bytes_received": int(report["bytes_received"]),
            "starts": record.starts,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "fedhds": __version__,
        },
    }
