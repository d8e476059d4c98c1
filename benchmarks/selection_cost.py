"""What selecting costs on one site's shard: this project's way against the paper's procedure written down plainly.

`ours` takes features in batches, without the LM head, projected as they come; `plain` runs row by row through the whole
model and keeps every layer in float64 (FedHDS, arXiv 2410.10926, as its released code does). Both then reduce by t-SNE
and cluster by HDBSCAN. Each runs in a process of its own with the same number of threads; imports and loading of the
model are not counted. Peak memory is the kernel's high-water mark of that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Line = dict[str, Any]

VARIANTS = ("ours", "plain")
MAX_LENGTH = 256
# Federated k-means at every size: rows to select, and sites.
_BUDGET = 100
_SITES = 20


def measure(data: Path, model: str, sizes: list[int], threads: int, write: Callable[[Line], None]) -> None:
    """Measures both variants at every size, one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    for size in sizes:
        for variant in VARIANTS:
            command = [sys.executable, "-m", __name__, variant, str(data), model, str(size)]
            process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            line = json.loads(process.stdout.splitlines()[-1])
            write({"part": "speed", "variant": variant, "rows": size, "threads": threads, **line})


def main() -> None:
    """One variant at one size, as a process; prints its line."""
    variant, data, model, size = sys.argv[1:]
    # Before anything is measured: both need them.
    import hdbscan  # noqa: F401
    import sklearn.decomposition
    import sklearn.manifold  # noqa: F401

    from fedhds_client.data.prompts import Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.models.loading import load_base_model

    with Shard.open(Path(data)) as shard:
        base = load_base_model(model, device="cpu")
        prompter = Prompter(base.tokenizer, max_length=MAX_LENGTH)
        rows = np.random.default_rng(0).permutation(len(shard))[: int(size)].tolist()

        def encode(number: int) -> list[int]:
            return prompter.encode(shard[rows[number]]).input_ids

        # Sets the high-water mark back to what is in use now.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _memory("VmRSS")
        started = time.process_time()
        line, values = {"ours": ours, "plain": plain}[variant](base, encode, len(rows))
        line |= {"cpu_s": round(time.process_time() - started, 2)}
        line |= {"seconds": round(line["features_s"] + line["reduction_s"] + line["clustering_s"], 2)}
        line |= {"loaded_mb": before, "peak_mb": _memory("VmHWM")}
        line |= arithmetic(base, map(encode, range(len(rows))), line["features_s"])
    if variant == "ours":
        line |= cost_of_kmeans(values)
    print(json.dumps(line))


def ours(base: Any, encode: Callable[[int], list[int]], count: int) -> tuple[Line, np.ndarray]:
    """The project's own way, as its strategy `fedhds` does it; and the features."""
    from fedhds_client.features.clustering import cluster
    from fedhds_client.features.extraction import extract_features
    from fedhds_client.features.projection import FeatureSpace
    from fedhds_client.features.reduction import reduce

    line: Line = {}
    with _timed(line, "features_s"):
        space = FeatureSpace(42, 256, "all", "last")
        features = extract_features(
            base.model, encode, range(count), space, pad_id=base.tokenizer.pad_token_id, batch_size=16
        )
    with _timed(line, "reduction_s"):
        points, _ = reduce(features.values, "tsne", seed=42)
    with _timed(line, "clustering_s"):
        clusters = cluster(features.ids, points, min_cluster_size=2)
    return line | {"clusters": len(clusters.centroids)}, features.values


def plain(base: Any, encode: Callable[[int], list[int]], count: int) -> tuple[Line, np.ndarray]:
    """The paper's procedure without a second thought."""
    import hdbscan
    import torch
    from sklearn.manifold import TSNE

    line: Line = {}
    with _timed(line, "features_s"), torch.no_grad():
        rows = []
        for number in range(count):
            output = base.model(input_ids=torch.tensor([encode(number)]), output_hidden_states=True)
            rows.append(torch.cat([layer[0, -1] for layer in output.hidden_states]).double().numpy())
        values = np.stack(rows)
    with _timed(line, "reduction_s"):
        points = TSNE(2, perplexity=min(30, count - 1), random_state=42).fit_transform(values)
    with _timed(line, "clustering_s"):
        # One job, as in ours: its default of four worker processes would hide from both clock and memory.
        model = hdbscan.HDBSCAN(min_cluster_size=2, core_dist_n_jobs=1).fit(points)
        centroids, nearest = [], []
        for label in range(model.labels_.max() + 1):
            members = np.flatnonzero(model.labels_ == label)
            centroids.append(np.average(points[members], axis=0, weights=model.probabilities_[members]))
            nearest.append(members[np.linalg.norm(points[members] - centroids[-1], axis=1).argmin()])
    return line | {"clusters": len(centroids)}, values


def arithmetic(base: Any, rows: Iterable[list[int]], seconds: float) -> Line:
    """Floating-point operations per second of the body's matrix products, and what these threads reach at most.

    Neither attention nor the LM head is counted, so that both variants are compared by the same work.
    """
    import torch

    weights = sum(
        weight.numel() for name, weight in base.model.named_parameters() if weight.ndim == 2 and "embed" not in name
    )
    operations = 2 * weights * sum(map(len, rows))
    left = torch.rand(2048, 2048)
    rates = []
    for _ in range(20):
        started = time.monotonic()
        left @ left
        rates.append(2 * 2048**3 / (time.monotonic() - started))
    return {"gflops": round(operations / seconds / 1e9, 1), "peak_gflops": round(max(rates) / 1e9, 1)}


def cost_of_kmeans(values: np.ndarray) -> Line:
    """Seconds of one assignment to a fixed number of centers, and of a whole selection, sites and coordinator."""
    from benchmarks.simulation import select
    from fedhds.kmeans import OVERSPLIT
    from fedhds_client.features.assignment import assign
    from fedhds_client.features.extraction import Features

    values = values / np.linalg.norm(values, axis=1, keepdims=True)
    line: Line = {"centers": OVERSPLIT * _BUDGET}
    features = Features(np.arange(len(values)), values)
    with _timed(line, "assign_s"):
        assign(features, values[: OVERSPLIT * _BUDGET])
    shards = {f"client-{number:02d}": values[number::_SITES] for number in range(_SITES)}
    with tempfile.TemporaryDirectory() as folder, _timed(line, "kmeans_s"):
        select(shards, Path(folder), "federated-kmeans", selection_budget=str(_BUDGET))
    return line


@contextmanager
def _timed(line: Line, name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    line[name] = round(time.monotonic() - started, 3)


def _memory(name: str) -> float:
    """Megabytes; of this program alone, while getrusage's would start from the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6, 1)


def show(lines: list[Line], plot: Path) -> None:
    """Prints Markdown tables and draws seconds and memory against rows."""
    latest = {(line["variant"], line["rows"]): line for line in lines}
    sizes = sorted({rows for _, rows in latest if all((variant, rows) in latest for variant in VARIANTS)})
    if not sizes:
        return
    print(
        "\n| rows | variant | features s | reduction s | clustering s | all s | ratio | CPU s | MB over model | ratio |"
    )
    print("| --: | --- | --: | --: | --: | --: | --: | --: | --: | --: |")
    for size in sizes:
        slow = latest["plain", size]
        for variant in VARIANTS:
            line = latest[variant, size]
            parts = (f"{line[name]:.1f}" for name in ("features_s", "reduction_s", "clustering_s", "seconds"))
            ratios = (f"{slow['seconds'] / line['seconds']:.2f}", f"{_over(slow) / _over(line):.2f}")
            row = [str(size), variant, *parts, ratios[0], f"{line['cpu_s']:.1f}", f"{_over(line):.0f}", ratios[1]]
            print("| " + " | ".join(row) + " |")
    centers = latest["ours", sizes[0]]["centers"]
    print(f"\nfederated-kmeans, budget {_BUDGET} rows, {_SITES} sites, up to {centers} centers\n")
    print("| rows | one assignment s | µs per row | whole selection s | ms per row |")
    print("| --: | --: | --: | --: | --: |")
    for size in sizes:
        line = latest["ours", size]
        one, whole = line["assign_s"], line["kmeans_s"]
        print(f"| {size} | {one:.3f} | {one / size * 1e6:.0f} | {whole:.1f} | {whole / size * 1e3:.2f} |")
    _plot(latest, sizes, plot)


def _over(line: Line) -> float:
    """Megabytes of the peak above what the loaded model takes."""
    return max(1.0, float(line["peak_mb"]) - float(line["loaded_mb"]))


def _plot(latest: dict[tuple[str, int], Line], sizes: list[int], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (seconds, memory, growth) = pyplot.subplots(1, 3, figsize=(13, 4))
    for variant in VARIANTS:
        lines = [latest[variant, size] for size in sizes]
        seconds.plot(sizes, [line["seconds"] for line in lines], marker="o", label=variant)
        memory.plot(sizes, [_over(line) for line in lines], marker="o", label=variant)
    for name, label in (("kmeans_s", "federated k-means, whole selection"), ("assign_s", "one assignment")):
        growth.plot(sizes, [latest["ours", size][name] for size in sizes], marker="o", label=label)
    first = latest["ours", sizes[0]]["kmeans_s"] / (sizes[0] * np.log(sizes[0]))
    growth.plot(sizes, [first * size * np.log(size) for size in sizes], "k--", label="n log n")
    seconds.set_title("features, reduction and clusters: seconds")
    memory.set_title("the same: peak MB over the loaded model")
    growth.set_title("federated k-means at a fixed number of centers: seconds")
    for axis in (seconds, memory, growth):
        axis.set(xlabel="rows", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=130)
    pyplot.close(figure)
    print(f"\n{plot}")


if __name__ == "__main__":
    main()
