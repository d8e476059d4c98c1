"""The lines of finished runs, and the table and the plot that are made of them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fedhds.errors import StorageError
from fedhds.evaluation import label_of

Line = dict[str, Any]


class RunLines:
    """runs.jsonl: a line for each finished run, durable before the next run begins."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        # What a crash cut short has no line feed; that run is run again.
        whole, _, cut = text.rpartition("\n")
        if cut:
            path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        try:
            self.lines: dict[str, Line] = {line["key"]: line for line in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} has a line that is no run's; remove it, or choose another --out") from error

    def add(self, key: str, line: Line) -> None:
        """Keeps the line of a finished run."""
        line = {"key": key, **line}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines[key] = line


@dataclass
class Group:
    """Runs that differ in the seed alone."""

    settings: dict[str, str]
    lines: list[Line] = field(default_factory=list)


def groups_of(lines: Iterable[Line]) -> list[Group]:
    """Runs by their swept settings without the seed, in order."""
    groups: dict[str, Group] = {}
    for line in lines:
        settings = {name: value for name, value in line["settings"].items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), Group(settings)).lines.append(line)
    return list(groups.values())


def last_values(line: Line, evaluator: str, metric: str) -> tuple[float, float] | None:
    """A metric before the first round and after the last one that has it; None where it was not measured."""
    rounds = line["result"]["evaluations"].get(evaluator, {})
    values = [
        metrics[metric] for _, metrics in sorted(rounds.items(), key=lambda item: int(item[0])) if metric in metrics
    ]
    return (values[0], values[-1]) if values else None


def interval(values: Sequence[float]) -> float:
    """Half of the 95 % confidence interval of the mean (Student's t); 0 for one value."""
    if len(values) < 2:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5)


def table_of(lines: Sequence[Line]) -> Table:
    """A row per group: mean, and interval over its seeds; losses and scores before and after."""
    groups = groups_of(lines)
    names = list(dict.fromkeys(name for group in groups for name in group.settings))
    measures = sorted(
        {
            (evaluator, metric)
            for line in lines
            for evaluator, rounds in line["result"]["evaluations"].items()
            for metrics in rounds.values()
            for metric in metrics
        }
    )
    table = Table(title="mean and 95 % interval over seeds", box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for name in names or ["run"]:
        table.add_column(name.replace("_", " "), no_wrap=True)
    for head in (
        "runs",
        "rows",
        *(f"{evaluator} {label_of(metric)}" for evaluator, metric in measures),
        "s",
        "MB sent",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for group in groups:
        rows = _spread(group, lambda line: line["result"]["trained_rows"], ".0f")
        rows += " of " + _spread(group, lambda line: line["result"]["pool_rows"], ".0f")
        cells = [_change(group, *measure) for measure in measures]
        seconds = _spread(group, lambda line: line["measured"]["seconds"], ".0f")
        sent = _spread(group, lambda line: line["measured"]["bytes_received"] / 1e6, ".1f")
        settings = [group.settings.get(name, "") for name in names] or ["all"]
        table.add_row(*settings, str(len(group.lines)), rows, *cells, seconds, sent)
    return table


def plot(lines: Sequence[Line], path: Path) -> bool:
    """Draws the loss of every evaluator over the rounds, a line per group, to a PNG file; whether there was any.

    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure

    evaluators = sorted({evaluator for line in lines for evaluator in line["result"]["evaluations"]})
    if not evaluators:
        return False
    figure = Figure(figsize=(6 * len(evaluators), 4), layout="constrained")
    for axes, evaluator in zip(figure.subplots(1, len(evaluators), squeeze=False)[0], evaluators, strict=True):
        for group in groups_of(lines):
            curve: dict[int, list[float]] = {}
            for line in group.lines:
                for number, metrics in line["result"]["evaluations"].get(evaluator, {}).items():
                    curve.setdefault(int(number), []).append(metrics["loss"])
            rounds = sorted(curve)
            means = [statistics.fmean(curve[number]) for number in rounds]
            bands = [interval(curve[number]) for number in rounds]
            label = ", ".join(group.settings.values()) or "run"
            axes.errorbar(rounds, means, yerr=bands if any(bands) else None, label=label, marker="o", capsize=3)
        axes.set(xlabel="round", ylabel="loss", title=f"loss on {evaluator}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    return True


def _spread(group: Group, value: Callable[[Line], float], form: str) -> str:
    values = [value(line) for line in group.lines]
    half = interval(values)
    return f"{statistics.fmean(values):{form}}" + (f" ± {half:{form}}" if half else "")


def _change(group: Group, evaluator: str, metric: str) -> str:
    pairs = [pair for line in group.lines if (pair := last_values(line, evaluator, metric))]
    if not pairs:
        return ""
    before, after = (statistics.fmean(column) for column in zip(*pairs, strict=True))
    half = interval([pair[1] for pair in pairs])
    return f"{before:.3f}→{after:.3f}" + (f" ± {half:.3f}" if half else "")
