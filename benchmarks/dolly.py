"""Dolly-15k over 20 clients: `fedhds` against `random` and `full`, by real daemons on this machine.

The shards are made by `fedhds split` with Dirichlet 0.5 over the categories and `summarization` held out, as in the
papers. All methods get the same model, rounds, cohorts and training settings. Prints a table and appends every run to
a JSON lines file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from google.protobuf import json_format

from demo.run import BIN, Daemon, address
from fedhds.v2 import status_pb2

CLIENTS = 20
# Decided on nano-llama; a model of billions of weights wants a hundredth of this learning rate.
SETTINGS = ("--learning-rate=1e-3", "--batch-size=4", "--max-length=256", "--max-new-tokens=64", "--evaluate-every=0")


def main() -> None:
    """Runs every method with every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, help="Dolly-15k: a file or its folder")
    parser.add_argument("--model", required=True, help="base model: a hub id or a path")
    parser.add_argument("--methods", nargs="+", default=["fedhds:1.5%", "random:1.5%", "full"], metavar="NAME[:BUDGET]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cohort-fraction", type=float, default=0.2)
    parser.add_argument("--unseen-rows", type=int, default=128)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="client processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("dolly.jsonl"))
    chosen = parser.parse_args()
    # Several processes share the cores here: OpenMP threads that wait for each other would take up most of their time.
    os.environ["OMP_NUM_THREADS"] = "1"
    for seed in chosen.seeds:
        for method in chosen.methods:
            with tempfile.TemporaryDirectory() as folder:
                line = run(chosen, method, seed, Path(folder))
            with chosen.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def run(chosen: argparse.Namespace, method: str, seed: int, folder: Path) -> dict[str, object]:
    """One run; what came out of it."""
    split = ("split", chosen.data, f"--clients={CLIENTS}", "--alpha=0.5", "--unseen=summarization")
    shards = folder / "shards"
    options = (f"--unseen-rows={chosen.unseen_rows}", f"--seed={seed}", f"--out={shards}")
    subprocess.run([BIN / "fedhds", *split, *options], check=True, stdout=subprocess.DEVNULL)
    strategy, _, budget = method.partition(":")
    daemons: list[Daemon] = []

    def start(name: str, program: str, *flags: str) -> Daemon:
        daemons.append(Daemon(name, "cyan", [str(BIN / program), *flags], folder / f"{name}.log", quiet=True))
        return daemons[-1]

    started = time.monotonic()
    try:
        coordinator = start(
            "coordinator",
            "fedhds-server",
            f"--model={chosen.model}",
            f"--rounds={chosen.rounds}",
            f"--cohort-fraction={chosen.cohort_fraction}",
            f"--strategy={strategy}",
            *([f"--budget={budget}"] if budget else []),
            f"--seed={seed}",
            f"--min-sites={CLIENTS}",
            "--min-evaluators=1",
            "--listen=127.0.0.1:0",
            f"--run-folder={folder / 'run'}",
            *SETTINGS,
        )
        server = address(folder / "run" / "address", coordinator)
        files = sorted(shards.glob("client-*.jsonl"))
        for number in range(chosen.processes):
            data = [str(file) for file in files[number :: chosen.processes]]
            flags = ["--data", *data, "--share-exact-cells", *_home(folder, number)]
            start(f"clients-{number}", "fedhds-client", f"--server={server}", *flags)
        unseen = f"--eval-data={shards / 'unseen.jsonl'}"
        start("evaluator", "fedhds-client", f"--server={server}", unseen, *_home(folder, "evaluator"))
        for daemon in daemons:
            if daemon.wait():
                sys.exit(f"{daemon.name} failed:\n{daemon.log.read_text()[-2000:]}")
    finally:
        for daemon in daemons:
            daemon.stop()
    status = json_format.Parse((folder / "run" / "report.json").read_text(), status_pb2.GetStatusResponse())
    measured = {line.round: line for line in status.evaluations}
    before, after = measured[0], measured[chosen.rounds]
    return {
        "method": method,
        "seed": seed,
        "rounds": chosen.rounds,
        "cohort_fraction": chosen.cohort_fraction,
        "rows": status.trained_rows,
        "pool": status.pool_rows,
        "row_steps": sum(closed.samples for closed in status.closed_rounds),
        "loss_before": round(before.loss, 4),
        "loss_after": round(after.loss, 4),
        "rouge_l_before": round(before.rouge_l, 4),
        "rouge_l_after": round(after.rouge_l, 4),
        "seconds": round(time.monotonic() - started),
        "megabytes_sent_by_sites": round(status.bytes_received / 1e6, 1),
    }


def _home(folder: Path, name: object) -> list[str]:
    return [f"--name={name}", f"--state={folder / f'state-{name}'}", f"--out={folder / f'out-{name}'}"]


if __name__ == "__main__":
    main()
