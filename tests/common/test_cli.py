"""The toolbox: certificates from end to end, one-line errors, and commands that other packages add."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedhds import __version__
from fedhds.security.credentials import TlsFiles, own_identity
from fedhds.security.identity import Role

COMMON = Path(__file__).parents[2] / "common"

PLUGIN = '''
import typer
from typing import Annotated


def hello(name: Annotated[str, typer.Option(help="Whom to greet.")] = "world") -> None:
    """Greet somebody."""
    typer.echo(f"hello {name}")


def needy() -> None:
    """Need something at the last moment."""
    import no_such_package_at_all


def broken() -> None:
    """Miss a module of its own."""
    import fedhds.no_such_module


def usage() -> None:
    """Fail by a person's mistake."""
    from fedhds.errors import SettingsError
    raise SettingsError("--name", "is wrong\\n  in two lines")


def storage() -> None:
    """Fail otherwise."""
    from fedhds.errors import StorageError
    raise StorageError("the disk is full")
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH with a package that is installed, as far as entry points can tell."""
    folder = tmp_path / "site"
    (folder / "fedhds_client" / "commands").mkdir(parents=True)
    (folder / "fedhds_client" / "__init__.py").touch()
    (folder / "fedhds_client" / "commands" / "__init__.py").touch()
    (folder / "fedhds_client" / "commands" / "adapter.py").write_text(PLUGIN)
    (folder / "fedhds_client" / "unfit.py").write_text("import no_such_package_at_all")
    (folder / "fedhds-0.1.0.dist-info").mkdir()
    (folder / "fedhds-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fedhds\nVersion: 0\n")
    names = ("hello", "needy", "broken", "usage", "storage", "vanished")
    entry_points = [f"{name} = fedhds_client.commands.adapter:{name}" for name in names]
    (folder / "fedhds-0.1.0.dist-info" / "entry_points.txt").write_text(
        "\n".join(["[fedhds.commands]", *entry_points, "unfit = fedhds_client.unfit:unfit", ""])
    )
    return folder


def _fedhds(*arguments: str, cwd: Path, plugins: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(folder) for folder in (plugins, COMMON) if folder is not None)
    return subprocess.run(
        [sys.executable, "-m", "fedhds.cli.toolbox", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def _flags(stdout: str) -> TlsFiles:
    """The files that the printed flags name."""
    named = dict(re.findall(r"--tls-(\w+) (\S+)", stdout))
    files = TlsFiles.from_settings(*(Path(named[flag]) for flag in ("ca", "cert", "key")))
    assert files is not None
    return files


@pytest.mark.slow
def test_certificates_from_init_to_flags_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = _fedhds("certs", "init", "--name", "clinics", "--days", "30", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "certs/ca.key" in made.stdout
    host = ["--host", "fed.example.org", "--host", "10.0.0.7"]
    issued = _fedhds("certs", "issue", "fed", "--role", "coordinator", *host, cwd=tmp_path)
    assert issued.returncode == 0, issued.stderr
    assert "fedhds-server --tls-ca" in issued.stdout
    coordinator = own_identity(_flags(issued.stdout))
    assert (coordinator.name, coordinator.role) == ("fed", Role.COORDINATOR)
    issued = _fedhds("certs", "issue", "a", "--role", "site", "--ca", "certs", "--out", "a", cwd=tmp_path)
    assert "fedhds-client --tls-ca a/ca.crt" in issued.stdout
    site = own_identity(_flags(issued.stdout))
    again = _fedhds("certs", "issue", "a", "--role", "site", "--out", "a", cwd=tmp_path)
    assert again.returncode == 2
    assert "--renew" in again.stderr
    renewed = _fedhds("certs", "issue", "a", "--role", "site", "--out", "a", "--renew", cwd=tmp_path)
    assert "Kept a/a.key" in renewed.stdout
    assert own_identity(_flags(renewed.stdout)) == site


def test_a_key_is_made_at_the_site_and_its_request_signed_elsewhere(tmp_path: Path) -> None:
    _fedhds("certs", "init", cwd=tmp_path)
    asked = _fedhds("certs", "request", "a", "--role", "site", "--out", "site", cwd=tmp_path)
    assert "fedhds certs issue a --role site --csr a.csr --out answer" in asked.stdout
    words = ("certs", "issue", "a", "--role", "site", "--csr", "site/a.csr", "--out", "answer")
    signed = _fedhds(*words, cwd=tmp_path)
    assert "Wrote answer/a.crt, for the site a" in signed.stdout
    files = TlsFiles(*(tmp_path / name for name in ("answer/ca.crt", "answer/a.crt", "site/a.key")))
    files.check()
    assert own_identity(files).name == "a"


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    failed = _fedhds("certs", "issue", "a", "--role", "site", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert re.fullmatch(r"fedhds: certs/ca\.crt does not exist: .*fedhds certs init.* \[FH10\]\n", failed.stderr)


@pytest.mark.parametrize("arguments", [("certs", "issue", "a", "--role", "king"), ("nonsense",), ("--nonsense",)])
def test_a_mistyped_command_line_is_status_2_without_traceback(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    failed = _fedhds(*arguments, cwd=tmp_path)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr


@pytest.mark.parametrize(
    "command", [("status",), ("pause", "--reason=r"), ("resume",), ("evict", "a", "--reason=r"), ("doctor",)]
)
def test_an_ipv6_address_without_brackets_is_refused_before_anything_is_asked(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    failed = _fedhds(*command, "--server=[::1]:8470,2001:db8::5:8470", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    words = "--server: '2001:db8::5:8470' is not HOST:PORT; an IPv6 address needs brackets and a port"
    assert failed.stderr == f"fedhds: {words}: [2001:db8::5]:8470 [FH11]\n"


def test_version(tmp_path: Path) -> None:
    assert _fedhds("--version", cwd=tmp_path).stdout == f"fedhds {__version__}\n"


def test_help_lists_added_commands_and_marks_what_cannot_be_imported(tmp_path: Path, plugins: Path) -> None:
    shown = _fedhds("--help", cwd=tmp_path, plugins=plugins)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^  certs +\S", shown.stdout, re.MULTILINE)
    assert re.search(r"^  hello +Greet somebody\.$", shown.stdout, re.MULTILINE)
    for name in ("unfit", "vanished"):
        marked = rf"^  {name} +\(unavailable: needs pip install 'fedhds\[client\]'\)$"
        assert re.search(marked, shown.stdout, re.MULTILINE)


def test_an_added_command_runs_with_its_own_options(tmp_path: Path, plugins: Path) -> None:
    assert _fedhds("hello", "--name", "you", cwd=tmp_path, plugins=plugins).stdout == "hello you\n"
    assert "Whom to greet" in _fedhds("hello", "--help", cwd=tmp_path, plugins=plugins).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("unfit",),
        pytest.param(("unfit", "--help"), marks=pytest.mark.slow),
        pytest.param(("unfit", "--some", "flag", "x"), marks=pytest.mark.slow),
        ("vanished",),
        pytest.param(("needy",), marks=pytest.mark.slow),
    ],
)
def test_a_command_whose_packages_are_missing_says_what_to_install(
    tmp_path: Path, plugins: Path, arguments: tuple[str, ...]
) -> None:
    failed = _fedhds(*arguments, cwd=tmp_path, plugins=plugins)
    assert failed.returncode == 2
    expected = rf"fedhds: `fedhds {arguments[0]}` needs pip install 'fedhds\[client\]' \(.+\) \[FH10\]\n"
    assert re.fullmatch(expected, failed.stderr)


def test_a_missing_module_of_our_own_is_a_defect_with_its_traceback(tmp_path: Path, plugins: Path) -> None:
    failed = _fedhds("broken", cwd=tmp_path, plugins=plugins)
    assert failed.returncode == 1
    assert "fedhds.no_such_module" in failed.stderr.splitlines()[-1]
    assert "Traceback" in failed.stderr


def test_errors_of_added_commands_are_one_line_with_the_right_status(tmp_path: Path, plugins: Path) -> None:
    usage = _fedhds("usage", cwd=tmp_path, plugins=plugins)
    assert (usage.returncode, usage.stderr) == (2, "fedhds: --name: is wrong   in two lines [FH11]\n")
    storage = _fedhds("storage", cwd=tmp_path, plugins=plugins)
    assert (storage.returncode, storage.stderr) == (1, "fedhds: the disk is full [FH50]\n")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """With the commands that this installation really has."""
    heavy = ("torch", "transformers", "numpy", "grpc", "cryptography", "sklearn", "sqlalchemy", "google.protobuf")
    script = f"""
        import sys
        from fedhds.cli.toolbox import app
        try:
            app(["--help"])
        except SystemExit as exit:
            assert not exit.code, exit.code
        loaded = [name for name in {heavy!r} if name in sys.modules]
        assert not loaded, loaded
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(COMMON)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "certs" in ran.stdout
