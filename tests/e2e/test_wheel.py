"""The wheel: both daemons in it, and a coordinator that runs without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.federation import Federation
from tests.support.hosts import steps
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_both_daemons_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert packages == {
        "fedhds",
        "fedhds_server",
        "fedhds_client",
        next(p for p in packages if p.endswith(".dist-info")),
    }
    for needed in (
        "fedhds/v2/federation_pb2_grpc.py",
        "fedhds_server/cli.py",
        "fedhds_client/cli.py",
        "fedhds_client/report/page.css",
        "fedhds_client/report/page.html.j2",
        "fedhds/py.typed",
        "fedhds_server/dashboard/index.html",
        "fedhds_server/dashboard/page.css",
        "fedhds_server/dashboard/page.js",
        "fedhds_server/dashboard/drawing.js",
        "fedhds_server/dashboard/icon.svg",
        "fedhds_server/storage/migrations/env.py",
        "fedhds_server/storage/migrations/versions/0001_run_and_journal.py",
    ):
        assert needed in names


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_coordinator_installs_without_torch_and_runs(wheel: Path, tmp_path: Path, federation: Federation) -> None:
    environment = tmp_path / "venv"
    shutil.copy(wheel, tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (block,) = steps("docs/two-hosts.md", "coordinator", "install")
    done = subprocess.run(
        ["bash", "-euc", block.text.replace("/opt/fedhds", str(environment))],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [environment / "bin" / "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    installed = {line.split("==")[0].lower() for line in listed.splitlines()}
    assert not installed & {"torch", "transformers", "peft", "safetensors"}
    assert {"fedhds", "grpcio", "sqlalchemy"} <= installed

    server = federation.start(
        "clean-server",
        str(environment / "bin" / "fedhds-server"),
        *federation.server_flags("--rounds=1", "--min-sites=1"),
    )
    server.wait_for("listens on")
    rows = write_rows(tmp_path / "rows.jsonl", {"sun": 10, "sea": 10})
    site = federation.client("a", f"--data={rows}")
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
