"""Hosts and files that are unlike a developer's: users without a home or an account, names that are not UTF-8."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.support.federation import Daemon, Federation
from tests.support.programs import BIN
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

NOBODY = 12345
FLAGS = (
    "--rounds=1",
    "--min-sites=1",
    "--selection-strategy=fedhds-aligned",
    "--reduction=pca",
    "--min-cluster-size=5",
)
# A name in Latin-1, from a disk that was written long ago.
CAFE = os.fsdecode(b"caf\xe9")


@pytest.fixture
def homeless(model: Path) -> Iterator[Federation]:
    """Its processes run under a number without an account, and without $HOME, as containers may."""
    if os.geteuid() or not shutil.which("setpriv"):
        pytest.skip("needs root and setpriv")
    # The installation may lie in root's own folder: it may be read, nothing there may be written.
    capability = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *capability)
    unset = (word for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME", "HF_HOME") for word in ("-u", name))
    # pytest's own folders let nobody else pass.
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        Path(folder).chmod(0o755)
        federation = Federation(Path(folder), model)
        federation.prefix = (*user, "env", *unset, "-C", folder)
        yield federation
        federation.stop()


def rows(federation: Federation, name: str = "a.jsonl", count: int = 20) -> Path:
    return write_rows(federation.folder / name, {"a": count, "b": count})


def ends(daemon: Daemon, status: int, *words: str) -> None:
    assert daemon.wait() == status, daemon.text
    assert "Traceback" not in daemon.text
    for word in words:
        assert word in daemon.text


def test_a_run_without_home_and_account(homeless: Federation) -> None:
    data, held_out = rows(homeless), rows(homeless, "e.jsonl", 3)
    server = homeless.server(*FLAGS)
    site = homeless.client("a", f"--data={data}", f"--eval-data={held_out}")
    ends(site, 0, "rouge_l")
    ends(server, 0)
    # Nothing is written to a folder called "~".
    assert not list(homeless.folder.rglob("*~*"))


@pytest.mark.long
def test_a_site_without_home_says_what_to_give(homeless: Federation) -> None:
    data = rows(homeless)
    ends(homeless.start("a", "fedhds-client", f"--data={data}"), 2, "--state: ", "give a folder, or set HOME [FH11]")
    ends(homeless.start("help", "fedhds-client", "--help"), 0, "--state")
    evaluate = ("evaluate", f"--model={homeless.model}", f"--data={data}", "--max-new-tokens=2")
    ends(homeless.start("evaluate", "fedhds", *evaluate), 2, "set HOME to a folder [FH10]")
    homeless.environment = {"HF_HUB_OFFLINE": "1"}
    home = ("env", f"HOME={homeless.folder}")
    ends(homeless.start("with-home", "fedhds", *evaluate, prefix=home), 0, "Rouge-L")
    ends(homeless.start("split", "fedhds", "split", data, "--sites=2", "--min-rows=2", f"--out={data.parent}/split"), 0)
    ends(homeless.start("doctor", "fedhds", "doctor", f"--folder={homeless.folder}"), 0)
    # A variable of the desktop's that leads to nobody's home.
    elsewhere = ("env", "XDG_STATE_HOME=~nobody-here/state")
    ends(homeless.start("xdg", "fedhds-client", f"--data={data}", prefix=elsewhere), 2, "--state: ")


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_numba_gets_a_cache_where_the_home_is_missing_or_read_only(homeless: Federation, home: str | None) -> None:
    # A function that numba caches, in a folder that the user may not write: as UMAP has many, which take a minute.
    modules = homeless.folder / "modules"
    modules.mkdir()
    (modules / "cached.py").write_text("import numba\n@numba.njit(cache=True)\ndef double(x):\n    return 2 * x\n")
    variables = ("env", f"HOME={home}") if home else ()
    state = homeless.folder / "state"

    def called(words: str) -> subprocess.CompletedProcess[str]:
        words = f"import sys, pathlib; sys.path.append({str(modules)!r});{words}import cached; print(cached.double(21))"
        command = (*homeless.prefix, *variables, str(BIN / "python"), "-c", words, str(state))
        return subprocess.run(command, capture_output=True, text=True, check=False)

    if home:
        assert "no locator available" in called("").stderr
    done = called("from fedhds_client.home import make_home; make_home(pathlib.Path(sys.argv[1]));")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr


def test_a_site_is_not_named_after_a_file_whose_name_is_not_utf_8(federation: Federation) -> None:
    data = rows(federation, f"{CAFE}.jsonl")
    other = rows(federation, "b.jsonl")
    state = f"--state={federation.folder / 'state'}"
    words = r"--data: the name of", r"caf\udce9.jsonl is not UTF-8", "rename the file"
    for flags in ((), ("--log-format=json",)):
        ends(federation.start("alone", "fedhds-client", f"--data={data}", state, *flags), 2, "or give --name")
    ends(federation.start("two", "fedhds-client", "--data", data, other, "--name=x", state), 2, *words)
    for flag, text in (("--name", CAFE), ("--model", federation.folder / CAFE)):
        site = federation.start("text", "fedhds-client", f"--data={data}", f"{flag}={text}", state)
        ends(site, 2, f"{flag}: it has bytes that are not UTF-8")


@pytest.mark.parametrize("kind", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_run_over_files_and_folders_whose_names_are_not_utf_8(federation: Federation, kind: str) -> None:
    folder = federation.folder / CAFE
    folder.mkdir()
    data = rows(federation)
    shard = folder / f"{CAFE}{kind}"
    if kind == ".jsonl":
        shutil.copy(data, shard)
    elif kind == ".jsonl.gz":
        shard.write_bytes(gzip.compress(data.read_bytes()))
    else:
        table = pyarrow.Table.from_pylist([json.loads(line) for line in data.read_text().splitlines()])
        with shard.open("wb") as file:
            pyarrow.parquet.write_table(table, file)
    shutil.copy(rows(federation, "e.jsonl", 3), folder / f"{CAFE}-e.jsonl")
    server = federation.server(*FLAGS)
    files = (f"--data={shard}", f"--eval-data={folder / f'{CAFE}-e.jsonl'}")
    flags = (f"--state={folder / 'state'}", f"--out={folder / 'out'}", "--log-format=json")
    site = federation.client("a", *files, *flags)
    ends(site, 0)
    ends(server, 0)
    # What a strict reader of JSON refuses, half a surrogate pair, is no part of any line.
    lines = [json.loads(line) for line in site.text.splitlines()]
    assert all(line["message"].encode() for line in lines)
    assert any(r"caf\udce9" in line["message"] for line in lines)
    assert (folder / "out" / "adapter_model.safetensors").exists()
    assert list(folder.rglob("report.html"))


def test_a_run_folder_must_be_utf_8(federation: Federation) -> None:
    words = r"--run-folder: the name of", r"caf\udce9 is not UTF-8, which SQLite needs; choose another folder [FH11]"
    ends(federation.start("server", "fedhds-server", *federation.server_flags(*FLAGS, run=CAFE)), 2, *words)


@pytest.mark.parametrize(
    "stdout",
    [
        "utf-8:strict",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("ascii:strict", "utf-8:surrogateescape")),
    ],
)
def test_the_toolbox_takes_such_names_or_says_which_is_at_fault(federation: Federation, stdout: str) -> None:
    folder = federation.folder / CAFE
    folder.mkdir()
    data = rows(federation, f"{CAFE}/{CAFE}.jsonl")
    federation.environment = {"PYTHONIOENCODING": stdout}
    fine: tuple[tuple[object, ...], ...] = (
        ("doctor", f"--folder={folder}"),
        ("split", data, "--sites=2", "--min-rows=2", f"--out={folder / 'split'}"),
        ("certs", "init", f"--out={folder / 'certs'}"),
        ("certs", "issue", "a", "--role=site", f"--ca={folder / 'certs'}"),
        ("evaluate", f"--model={federation.model}", f"--data={data}", "--max-new-tokens=2", "--json"),
    )
    for command in fine:
        ends(federation.start(str(command[0]), "fedhds", *command), 0)
    refused: tuple[tuple[object, ...], ...] = (
        ("status", f"--server={CAFE}:1"),
        ("pause", f"--reason={CAFE}", "--server=localhost:1"),
        ("evict", CAFE, "--reason=r", "--server=localhost:1"),
    )
    for command in refused:
        ends(federation.start(str(command[0]), "fedhds", *command), 2, r"caf\udce9", "is not UTF-8", "[FH10]")
