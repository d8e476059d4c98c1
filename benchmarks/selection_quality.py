"""Tables and plots of how good the picks of selection are, from the recorded lines of `benchmarks.selection`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Line = dict[str, Any]

STRATEGIES = ("random", "fedhds", "fedhds-aligned", "federated-kmeans")
# Not a strategy: k-means of the judging embedding itself on the pooled rows, to show how much room there is.
CEILING = "ceiling"
MEASURES = ("coverage", "redundancy", "balance")


def show(lines: list[Line], sites: int, plot: Path) -> None:
    """Prints a Markdown table and draws coverage and redundancy against the budget."""
    pool = max((line["pool"] for line in lines), default=0)
    latest = {
        (line["strategy"], line.get("features", ""), line.get("budget", ""), line.get("seed", 0)): line
        for line in lines
        if line["pool"] == pool
    }
    if not latest:
        return
    groups: dict[tuple[str, str, str], dict[int, Line]] = {}
    for (strategy, choice, budget, seed), line in latest.items():
        groups.setdefault((budget, choice, strategy), {})[seed] = line
    order = (*STRATEGIES, CEILING, "full")
    keys = sorted(groups, key=lambda key: (_share(key[0]), key[1] != "", key[1], order.index(key[2])))
    print(f"\n{pool} rows over {sites} sites; in brackets the paired difference to random with its 95 % t-interval\n")
    print("| budget | strategy | features | seeds | picks | " + " | ".join(MEASURES) + " | kB sent | kB received |")
    print("| --: | --- | --- | --: | --: | --: | --: | --: | --: | --: |")
    for budget, choice, strategy in keys:
        by_seed = groups[budget, choice, strategy]
        base = groups.get((budget, "", "random"), {}) if strategy not in ("random", "full") else {}
        measures = [
            _compared([line[name] for line in by_seed.values()], *_paired(by_seed, base, name)) for name in MEASURES
        ]
        picks = _mean(by_seed.values(), "picks", ".0f")
        traffic = [_mean(by_seed.values(), name, ",.1f") for name in ("sent_kb", "received_kb")]
        row = (budget, f"`{strategy}`", choice, str(len(by_seed)), picks, *measures, *traffic)
        print("| " + " | ".join(row) + " |")
    _plot(groups, plot)


def _share(budget: str) -> float:
    return float(budget.rstrip("%") or 100)


def _mean(lines: Iterable[Line], name: str, form: str) -> str:
    values = [line[name] for line in lines if name in line]
    return format(np.mean(values), form) if values else ""


def _paired(by_seed: dict[int, Line], base: dict[int, Line], measure: str) -> tuple[float, float] | tuple[()]:
    """Mean difference to `base` over the seeds of both, and half of its 95 % t-interval."""
    from scipy import stats

    differences = [by_seed[seed][measure] - base[seed][measure] for seed in by_seed if seed in base]
    if len(differences) < 2:
        return ()
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences))
    return float(np.mean(differences)), float(half)


def _compared(values: list[float], difference: float | None = None, half: float = 0.0) -> str:
    text = f"{np.mean(values):.3f}"
    if difference is None:
        return text
    sure = "**" if abs(difference) > half else ""
    return f"{text} ({sure}{difference:+.3f}{sure} ± {half:.3f})"


def _plot(groups: dict[tuple[str, str, str], dict[int, Line]], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    choices = sorted({choice for _, choice, _ in groups if choice}) or [""]
    figure, axes = pyplot.subplots(
        2, len(choices), figsize=(3.6 * len(choices), 6.5), sharex=True, sharey="row", squeeze=False
    )
    for column, choice in enumerate(choices):
        for row, measure in enumerate(MEASURES[:2]):
            axis = axes[row][column]
            for number, strategy in enumerate((*STRATEGIES, CEILING)):
                mine = choice if (strategy not in ("random", CEILING)) else ""
                budgets = sorted({key[0] for key in groups if key[1:] == (mine, strategy)}, key=_share)
                if not budgets:
                    continue
                runs = [[line[measure] for line in groups[budget, mine, strategy].values()] for budget in budgets]
                means, shares = [np.mean(values) for values in runs], [_share(budget) for budget in budgets]
                (curve,) = axis.plot(shares, means, marker="o", markersize=3, label=strategy, color=f"C{number}")
                lowest, highest = list(map(min, runs)), list(map(max, runs))
                axis.fill_between(shares, lowest, highest, alpha=0.15, color=curve.get_color())
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
            if not row:
                axis.set_title(choice, fontsize=10)
            if not column:
                axis.set_ylabel(measure + (" (higher is better)" if measure == "coverage" else " (lower is better)"))
        axes[1][column].set_xlabel("budget, % of all rows")
    axes[0][0].legend(fontsize=8)
    figure.suptitle("Picks judged in TF-IDF/SVD; mean and range over seeds, per feature choice", fontsize=11)
    figure.tight_layout()
    figure.savefig(plot, dpi=130)
    pyplot.close(figure)
    print(f"\n{plot}")
