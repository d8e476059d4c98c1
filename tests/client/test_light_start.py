"""A site that cannot start says so at once: without the libraries that models need, which take seconds to import."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedhds.errors import EnrollmentRefused
from fedhds.grpc_errors import abort
from fedhds.v2 import federation_pb2_grpc as rpc
from tests.support.tiny import write_rows

HEAVY = ("torch", "transformers", "peft", "sklearn", "nltk", "scipy", "datasets", "accelerate")
NOBODY = "127.0.0.1:1"
# The console script, then what it has imported and the CPU seconds that it took.
SCRIPT = f"""
import json, sys, time
from fedhds_client.cli import main
try:
    main()
except SystemExit as end:
    status = end.code
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps([status, heavy, time.process_time()]))
"""


def started(folder: Path, *flags: object) -> tuple[int, str, list[str], float]:
    """Exit status, what stderr says, heavy modules and CPU seconds of a site that ends by itself."""
    words = [sys.executable, "-c", SCRIPT, f"--state={folder / 'state'}", f"--out={folder / 'out'}", *map(str, flags)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FEDHDS_")}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    status, heavy, seconds = json.loads(done.stdout.splitlines()[-1])
    return status, done.stderr, heavy, seconds


def bad_row(folder: Path) -> Path:
    path = folder / "bad.jsonl"
    path.write_text('{"instruction": "Why?", "response": 7}\n')
    return path


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        pytest.param(
            lambda folder: ["--data", folder / "none.jsonl", "--server", NOBODY],
            "there is no such file",
            marks=pytest.mark.slow,
        ),
        (lambda folder: ["--data", bad_row(folder), "--server", NOBODY], "response must be text"),
        pytest.param(
            lambda folder: ["--data", write_rows(folder / "a.jsonl", {"a": 3}), "--server", "hub:99999"],
            "--server",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda folder: ["--server", NOBODY, "--data", folder, "--lora-rank", "2"],
            "--lora-rank",
            marks=pytest.mark.slow,
        ),
        (
            lambda folder: [
                *("--data", write_rows(folder / "a.jsonl", {"a": 3}), "--server", NOBODY),
                *("--insecure", "--reconnect-timeout", 0.2),
            ],
            "no answer from the coordinator",
        ),
    ],
    ids=["no file", "bad row", "wrong server", "wrong flag", "no coordinator"],
)
def test_a_mistake_is_reported_without_heavy_imports(tmp_path: Path, flags: Any, words: str) -> None:
    status, text, heavy, _ = started(tmp_path, *flags(tmp_path))
    assert status
    assert words in text
    assert "Traceback" not in text
    assert heavy == []


@pytest.mark.slow
def test_a_missing_file_costs_less_than_a_cpu_second(tmp_path: Path) -> None:
    """CPU time, the best of three: another program slows a start down, but does not speed it up."""
    flags = ("--data", tmp_path / "none.jsonl", "--server", NOBODY)
    assert min(started(tmp_path, *flags)[-1] for _ in range(3)) < 1


class _Refusing(rpc.FederationServicer):
    async def Enroll(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802 - gRPC's name
        await abort(context, EnrollmentRefused("the name 'a' is another site's"))


async def test_a_name_that_is_refused_costs_no_heavy_imports(tmp_path: Path) -> None:
    server = grpc.aio.server()
    rpc.add_FederationServicer_to_server(_Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    flags: Sequence[object] = (
        *("--data", write_rows(tmp_path / "a.jsonl", {"a": 3})),
        *("--server", f"127.0.0.1:{port}", "--insecure", "--name", "a"),
    )
    status, text, heavy, _ = await asyncio.to_thread(started, tmp_path, *flags)
    await server.stop(None)
    assert (status, heavy) == (1, [])
    assert "is another site's" in text


@pytest.mark.slow
def test_a_site_that_waits_imports_meanwhile(tmp_path: Path) -> None:
    flags = ("--data", write_rows(tmp_path / "a.jsonl", {"a": 3}), "--server", NOBODY, "--insecure")
    status, _, heavy, _ = started(tmp_path, *flags, "--reconnect-timeout", 3)
    assert status == 1
    assert {"torch", "transformers", "peft"} <= set(heavy)
