"""Crashes, wrong flags and bad input, against real processes: a clear message, a right status, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.federation import Federation, file_system, free_port
from tests.support.programs import BIN
from tests.support.tiny import make_model, write_rows

pytestmark = pytest.mark.e2e


def shard(folder: Path, name: str = "a", rows: int = 8) -> Path:
    return write_rows(folder / f"{name}.jsonl", {"sun": rows})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=/nowhere/model"], "/nowhere/model"),
        (["--server=127.0.0.1:1", "--reconnect-timeout=1"], "nothing listens"),
        (["--server=no-such-host.invalid:8470", "--reconnect-timeout=1"], "cannot be resolved"),
        (["--server=8470"], "not HOST:PORT"),
        (["--data=/nowhere/shard.jsonl"], "/nowhere/shard.jsonl"),
        (["--tls-ca=/nowhere/ca.crt"], "--tls-cert"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_what_a_site_was_asked_for_is_refused_with_a_reason(
    federation: Federation, flags: list[str], words: str
) -> None:
    federation.server("--rounds=1")
    site = federation.client("a", f"--data={shard(federation.folder)}", *flags)
    assert site.wait() in (1, 2)
    assert words in site.text
    assert "Traceback" not in site.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("{\n", "line 1"),
        ('{"instruction": "Do it.", "response": "Done."}\n{"instruction": 3}\n', "line 2"),
        ('{"question": "q", "answer": "a"}\n', "line 1"),
    ],
)
def test_a_bad_shard_is_refused_before_anything_is_sent(federation: Federation, content: str, words: str) -> None:
    path = federation.folder / "bad.jsonl"
    path.write_text(content)
    site = federation.client("a", f"--data={path}", server="127.0.0.1:1")
    assert site.wait() == 2
    assert "bad.jsonl" in site.text
    assert words in site.text
    assert "Traceback" not in site.text


def test_bad_rows_can_be_skipped_and_are_counted(federation: Federation) -> None:
    path = shard(federation.folder)
    with path.open("a") as file:
        file.write("not json\n")
    server = federation.server("--rounds=1", "--min-sites=1", "--selection-strategy=full")
    site = federation.client("a", f"--data={path}", "--skip-bad-rows")
    assert (server.wait(), site.wait()) == (0, 0), site.text
    assert "8 rows, 1 skipped" in site.text


def test_a_shard_of_one_row_and_rows_longer_than_the_context_are_trained_on(federation: Federation) -> None:
    one = shard(federation.folder, "one", 1)
    long = federation.folder / "long.jsonl"
    long.write_text(json.dumps({"instruction": "word " * 400, "response": "yes"}) + "\n")
    server = federation.server("--rounds=1", "--selection-strategy=full", "--max-length=64")
    sites = [federation.client("one", f"--data={one}"), federation.client("long", f"--data={long}")]
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0, 0]
    assert "truncated" in sites[1].text


def test_a_model_without_a_tokenizer_is_refused(federation: Federation, tmp_path: Path) -> None:
    bare = make_model(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    federation.server("--rounds=1")
    site = federation.client("a", f"--data={shard(federation.folder)}", f"--model={bare}")
    assert site.wait() == 2
    assert "tokenizer" in site.text
    assert "Traceback" not in site.text


def test_a_site_whose_model_lacks_the_targets_tells_the_operator_who_sets_them(federation: Federation) -> None:
    server = federation.server("--rounds=1", "--min-sites=2", "--max-shards=2", "--lora-targets", "q_proj,nope_proj")
    # Two sites of one process end together.
    data = [str(shard(federation.folder, name)) for name in ("one", "two")]
    site = federation.client("a", "--data", *data)
    assert site.wait() == 2, site.text
    message = "ModelError: --lora-targets, which the operator of the coordinator sets, names 'nope_proj'"
    server.wait_for(f"site a/one left: {message}")
    server.wait_for(f"site a/two left: {message}")
    answer = programs.run("fedhds", "status", "--server", federation.address(), "--json")
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    assert "--lora-targets, which the operator of the coordinator sets," in status["message"]
    assert [told["state"] for told in status["sites"]] == ["left", "left"]
    assert all(told["last_error"].startswith(message) for told in status["sites"])
    assert status["spec"]["peft"]["targets"] == ["q_proj", "nope_proj"]
    assert "Traceback" not in site.text + server.text


def test_a_site_whose_every_task_failed_does_not_end_well(federation: Federation) -> None:
    server = federation.server("--rounds=1", "--selection-strategy=fedhds-aligned", "--heartbeat-timeout=5")
    well = federation.client("a", f"--data={shard(federation.folder)}")
    # It releases nothing without noise.
    failing = federation.client("b", f"--data={shard(federation.folder, 'b')}", "--selection-max-epsilon=1")
    assert (server.wait(), well.wait(), failing.wait()) == (0, 0, 1), server.text + failing.text
    assert "every task of this site failed (1 of them); the run ended without it" in failing.text


def test_a_run_whose_every_selection_failed_names_the_failures(federation: Federation) -> None:
    server = federation.server("--rounds=1", "--min-sites=1", "--heartbeat-timeout=5")
    site = federation.client("a", f"--data={shard(federation.folder)}", "--selection-max-epsilon=1")
    assert (server.wait(), site.wait()) == (1, 1)
    assert "no site could select; last failures: site a: PrivacyError: " in server.text
    assert "no site could select; this site's last failure: PrivacyError: " in site.text
    assert "--selection-budget" not in server.text


def test_another_base_model_is_refused_saying_what_differs(federation: Federation, tmp_path: Path) -> None:
    federation.server("--rounds=1", "--min-sites=2")
    first = federation.client("a", f"--data={shard(federation.folder)}")
    first.wait_for("waiting for 1 more site")
    other = make_model(tmp_path / "other", seed=1)
    second = federation.client("b", f"--data={shard(federation.folder, 'b')}", f"--model={other}")
    assert second.wait() == 1
    assert "the weights differs" in second.text
    assert first.process.poll() is None


def test_a_coordinator_that_is_killed_goes_on_and_the_adapter_is_the_same(federation: Federation) -> None:
    folder = federation.folder
    shards = [shard(folder, name, 10) for name in "ab"]
    plain = federation.server("--rounds=3", "--selection-strategy=full", run="plain")
    for name, path in zip("ab", shards, strict=True):
        federation.client(name, f"--data={path}", server=federation.address("plain"))
    assert plain.wait() == 0, plain.text
    for daemon in federation.daemons:
        daemon.wait()

    listen = f"127.0.0.1:{free_port()}"
    server = federation.server("--rounds=3", "--selection-strategy=full", run="killed", listen=listen)
    sites = [federation.client(n, f"--data={path}", server=listen) for n, path in zip("ab", shards, strict=True)]
    for words in ("the run starts", "round 1 closed", "round 2 closed"):
        server.wait_for(words)
        server.kill()
        server = federation.server("--rounds=3", "--selection-strategy=full", run="killed", listen=listen)
        server.wait_for("going on with run")
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0, 0]
    results = [(folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes() for run in ("plain", "killed")]
    assert results[0] == results[1]


@pytest.mark.long
def test_a_site_that_is_killed_is_taken_for_lost_and_comes_back(federation: Federation) -> None:
    folder = federation.folder
    server = federation.server("--rounds=60", "--selection-strategy=full", "--heartbeat-timeout=3", "--min-sites=2")
    a, b = shard(folder, "a"), shard(folder, "b")
    frozen = federation.client("a", f"--data={a}")
    killed = federation.client("b", f"--data={b}")
    server.wait_for("round 1 of 60 opens with a, b")
    killed.kill()
    server.wait_for("site b is lost")
    # Nobody is left: the run waits, however long it takes until somebody is back.
    frozen.process.send_signal(signal.SIGSTOP)
    server.wait_for("site a is lost")
    again = federation.client("b", f"--data={b}")
    server.wait_for("opens with b\n")
    frozen.process.send_signal(signal.SIGCONT)
    assert server.wait() == 0, server.text
    assert [again.wait(), frozen.wait()] == [0, 0], again.text + frozen.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_cleanly_and_the_run_goes_on_later(federation: Federation, number: signal.Signals) -> None:
    folder = federation.folder
    server = federation.server("--rounds=2", "--selection-strategy=full", "--min-sites=1")
    site = federation.client("a", f"--data={shard(folder)}")
    server.wait_for("round 1 of 2 opens")
    site.process.send_signal(number)
    assert site.wait() == 128 + number
    server.process.send_signal(number)
    assert server.wait() == 128 + number
    for daemon in (server, site):
        assert "Traceback" not in daemon.text
    server = federation.server("--rounds=2", "--selection-strategy=full", "--min-sites=1")
    site = federation.client("a", f"--data={shard(folder)}")
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text


def test_an_occupied_port_is_said(federation: Federation) -> None:
    federation.server("--rounds=1", run="first")
    second = federation.start(
        "server",
        "fedhds-server",
        *federation.server_flags("--rounds=1", run="second", listen=federation.address("first")),
    )
    assert second.wait() == 2
    assert "the port is taken" in second.text
    assert "Traceback" not in second.text


def test_a_run_folder_in_use_or_of_another_run_is_refused(federation: Federation) -> None:
    server = federation.server("--rounds=1")
    second = federation.start("server", "fedhds-server", *federation.server_flags("--rounds=1"))
    assert second.wait() == 2
    assert "in use by another coordinator" in second.text
    server.kill()
    third = federation.start("server", "fedhds-server", *federation.server_flags("--rounds=5"))
    assert third.wait() == 2
    assert "rounds 1, now 5" in third.text


def test_a_run_folder_that_cannot_be_written_is_said(federation: Federation) -> None:
    # Root writes everywhere but below a file.
    blocked = federation.folder / "file"
    blocked.touch()
    server = federation.start(
        "server", "fedhds-server", *federation.server_flags("--rounds=1"), f"--run-folder={blocked / 'run'}"
    )
    assert server.wait() in (1, 2)
    assert "--run-folder" in server.text
    assert "Traceback" not in server.text


@pytest.fixture
def mount(federation: Federation) -> Iterator[Path]:
    """A file system of 4 MiB, which a test can fill up; what runs on it is ended before it goes."""
    with file_system(federation, 4) as folder:
        yield folder


def test_a_full_disk_stops_nothing_that_was_accepted(federation: Federation, mount: Path) -> None:
    """The run folder is a tiny file system that is filled up in mid-run and then freed."""
    server = federation.server("--rounds=3", "--selection-strategy=full", "--min-sites=1", run="small/run")
    site = federation.client("a", f"--data={shard(federation.folder)}", server=federation.address("small/run"))
    server.wait_for("round 1 of 3 opens")
    filler = mount / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(os.urandom(8 << 20))
    server.wait_for("disk")
    filler.unlink()
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
    assert "Traceback" not in server.text
    server.wait_for("the run is complete")


def test_a_site_with_a_full_disk_tries_again_until_there_is_room(federation: Federation, mount: Path) -> None:
    server = federation.server("--rounds=2", "--selection-strategy=full", "--min-sites=1")
    filler = mount / "filler"
    site = federation.client("a", f"--data={shard(federation.folder)}", f"--state={mount / 'state'}")
    server.wait_for("enrolled with")
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(os.urandom(8 << 20))
    site.wait_for("trying again in")
    filler.unlink()
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
    assert "Traceback" not in site.text
    assert "failed its train task" not in server.text


def test_processes_of_one_host_may_share_a_state_folder(federation: Federation) -> None:
    server = federation.server("--rounds=3", "--selection-strategy=full", "--min-sites=4")
    sites = [
        federation.client(name, f"--data={shard(federation.folder, name)}", f"--state={federation.folder / 'state'}")
        for name in "abcd"
    ]
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0] * 4, "\n".join(site.text for site in sites)
    assert "failed" not in server.text


def test_a_site_that_missed_the_end_gets_the_adapter_from_a_coordinator_that_is_started_again(
    federation: Federation,
) -> None:
    # Longer than the longest pause between two tries of a site.
    flags = ("--rounds=2", "--selection-strategy=full", "--min-sites=2", "--heartbeat-timeout=8")
    listen = f"127.0.0.1:{free_port()}"
    server = federation.server(*flags, listen=listen)
    present = federation.client("a", f"--data={shard(federation.folder, 'a', 40)}")
    missing = federation.client("b", f"--data={shard(federation.folder, 'b')}")
    server.wait_for("round 1 of 2 opens")
    missing.kill()
    assert (server.wait(), present.wait()) == (0, 0), server.text
    late = federation.client("b", f"--data={federation.folder / 'b.jsonl'}", server=listen)
    late.wait_for("trying again")
    again = federation.server(*flags, listen=listen)
    assert (again.wait(), late.wait()) == (0, 0), again.text + late.text
    for name in ("a", "b"):
        assert (federation.folder / "out" / name / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("program", ["fedhds", "fedhds-server", "fedhds-client"])
def test_help_needs_no_heavy_import(program: str) -> None:
    code = (
        f"import sys; sys.argv = [{program!r}, '--help']\n"
        "from importlib.metadata import entry_points\n"
        f"main = entry_points(group='console_scripts')[{program!r}].load()\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code or 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'grpc', 'sqlalchemy', 'alembic', 'psycopg'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--version" in done.stdout
    assert subprocess.run([str(BIN / program), "--version"], capture_output=True, text=True).returncode == 0
