"""Dolly-15k over 20 sites: `fedhds` against `random` and `full`, by real daemons on this machine.

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

from demo.run import BIN, Daemon, address

SITES = 20
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
    arguments = parser.parse_args()
    # Several processes share the cores here: OpenMP threads that wait for each other would take up most of their time.
    os.environ["OMP_NUM_THREADS"] = "1"
    for seed in arguments.seeds:
        for method in arguments.methods:
            with tempfile.TemporaryDirectory() as folder:
                line = run(arguments, method, seed, Path(folder))
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def run(arguments: argparse.Namespace, method: str, seed: int, folder: Path) -> dict[str, object]:
    """One run; what came out of it."""
    split = ("split", arguments.data, f"--sites={SITES}", "--alpha=0.5", "--unseen=summarization")
    shards = folder / "shards"
    options = (f"--unseen-rows={arguments.unseen_rows}", f"--seed={seed}", f"--out={shards}")
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
            f"--model={arguments.model}",
            f"--rounds={arguments.rounds}",
            f"--cohort-fraction={arguments.cohort_fraction}",
            f"--selection-strategy={strategy}",
            *([f"--selection-budget={budget}"] if budget else []),
            f"--seed={seed}",
            f"--min-sites={SITES}",
            "--min-evaluators=1",
            "--listen=127.0.0.1:0",
            f"--run-folder={folder / 'run'}",
            *SETTINGS,
        )
        server = address(folder / "run" / "address", coordinator)
        files = sorted(shards.glob("site-*.jsonl"))
        for number in range(arguments.processes):
            data = [str(file) for file in files[number :: arguments.processes]]
            flags = ["--data", *data, "--allow-exact-kmeans-sums", *_home(folder, number)]
            start(f"sites-{number}", "fedhds-client", f"--server={server}", *flags)
        unseen = f"--eval-data={shards / 'unseen.jsonl'}"
        start("evaluator", "fedhds-client", f"--server={server}", unseen, *_home(folder, "evaluator"))
        for daemon in daemons:
            if daemon.wait():
                sys.exit(f"{daemon.name} failed:\n{daemon.log.read_text()[-2000:]}")
    finally:
        for daemon in daemons:
            daemon.stop()
    report = json.loads((folder / "run" / "report.json").read_text())
    evaluations = {line["round_number"]: line["metrics"] for line in report["evaluations"]}
    before, after = evaluations[0], evaluations[arguments.rounds]
    return {
        "method": method,
        "seed": seed,
        "rounds": arguments.rounds,
        "cohort_fraction": arguments.cohort_fraction,
        "rows": int(report["trained_rows"]),
        "pool": int(report["pool_rows"]),
        "row_steps": sum(int(closed["samples"]) for closed in report["closed_rounds"]),
        "loss_before": round(before["loss"], 4),
        "loss_after": round(after["loss"], 4),
        "rouge_l_before": round(before["rouge_l"], 4),
        "rouge_l_after": round(after["rouge_l"], 4),
        "seconds": round(time.monotonic() - started),
        "megabytes_sent_by_sites": round(int(report["bytes_received"]) / 1e6, 1),
    }


def _home(folder: Path, name: object) -> list[str]:
    return [f"--name={name}", f"--state={folder / f'state-{name}'}", f"--out={folder / f'out-{name}'}"]


if __name__ == "__main__":
    main()
