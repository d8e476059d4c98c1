"""What DP-SGD costs in quality: unseen loss and Rouge-L against epsilon, under fedavg, ffa and alternating.

`python -m benchmarks.privacy --data ROWS --model MODEL --out FOLDER` runs `fedhds simulate` as a sweep of aggregators,
epsilons and seeds, and goes on where it was interrupted. Epsilon 0 stands for infinite: no noise. It writes
`privacy.jsonl`, a line for each aggregator and epsilon with means and 95 percent intervals over the seeds, and
`privacy.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from scipy import stats

AGGREGATORS = ("fedavg", "ffa", "alternating")
EPSILONS = (0.0, 50.0, 20.0, 8.0, 3.0, 1.0)
METRICS = ("loss", "rouge_l")


def simulate(arguments: argparse.Namespace) -> Path:
    """Runs the sweep; the file with a line for every finished run."""
    command = [
        str(Path(sys.executable).parent / "fedhds"),
        "simulate",
        *(f"--data={arguments.data}", f"--model={arguments.model}", f"--out={arguments.out}"),
        *(f"--unseen={arguments.unseen}", f"--unseen-rows={arguments.unseen_rows}"),
        *(f"--sites={arguments.sites}", f"--rounds={arguments.rounds}", f"--batch-size={arguments.batch_size}"),
        *(f"--learning-rate={arguments.learning_rate}", f"--evaluate-every={arguments.rounds}"),
        *("--selection-strategy=full", f"--delta={arguments.delta}", "--alpha=1000"),
        f"--aggregator={','.join(arguments.aggregators)}",
        f"--epsilon={','.join(f'{epsilon:g}' for epsilon in arguments.epsilons)}",
        f"--seed={','.join(str(seed) for seed in range(arguments.seeds))}",
        *arguments.flags,
    ]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(status)
    return Path(arguments.out) / "runs.jsonl"


def summary(lines: list[dict[str, Any]], single: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over seeds by aggregator and epsilon, with the half width of their 95 percent intervals.

    A line has the settings that were swept; `single` has those that have one value.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in lines:
        settings = {**single, **line["settings"]}
        groups.setdefault((settings["aggregator"], float(settings["epsilon"])), []).append(line)
    made = []
    for (aggregator, epsilon), runs in sorted(groups.items(), key=lambda item: (item[0][0], -(item[0][1] or math.inf))):
        row: dict[str, Any] = {"aggregator": aggregator, "epsilon": epsilon or None, "seeds": len(runs)}
        for metric in METRICS:
            values = [last[metric] for run in runs if metric in (last := _last(run["result"]["evaluations"]["unseen"]))]
            if values:
                row[metric] = round(statistics.mean(values), 5)
            if len(values) > 1:
                width = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
                row[f"{metric}_interval"] = round(float(width), 5)
        made.append(row)
    return made


def _last(rounds: dict[str, dict[str, float]]) -> dict[str, float]:
    return rounds[max(rounds, key=int)]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """One panel a metric, one line an aggregator; the right edge is no noise."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(5 * len(METRICS), 3.5), squeeze=False)
    labels = sorted({row["epsilon"] or math.inf for row in rows})
    for panel, metric in zip(panels[0], METRICS, strict=True):
        for aggregator in sorted({row["aggregator"] for row in rows}):
            own = {row["epsilon"] or math.inf: row for row in rows if row["aggregator"] == aggregator and metric in row}
            places = [index for index, epsilon in enumerate(labels) if epsilon in own]
            values = [own[labels[index]][metric] for index in places]
            widths = [own[labels[index]].get(f"{metric}_interval", 0.0) for index in places]
            panel.errorbar(places, values, widths, label=aggregator, capsize=3, marker="o")
        panel.set_xticks(
            range(len(labels)), ["no noise" if epsilon == math.inf else f"{epsilon:g}" for epsilon in labels]
        )
        panel.set(xlabel="epsilon of each row over the run", ylabel=f"{metric} on unseen rows")
        panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="privacy-runs")
    parser.add_argument("--unseen", default="summarization")
    parser.add_argument("--unseen-rows", type=int, default=100)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--aggregators", nargs="+", default=AGGREGATORS)
    parser.add_argument("flags", nargs="*", help="more flags of fedhds simulate, behind --")
    arguments = parser.parse_args()
    file = simulate(arguments)
    single = {"aggregator": arguments.aggregators[0], "epsilon": arguments.epsilons[0]}
    rows = summary([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()], single)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (Path(arguments.out) / "privacy.jsonl").write_text(text, encoding="utf-8")
    print(text, end="")
    plot(rows, Path(arguments.out) / "privacy.png")


if __name__ == "__main__":
    main()
