"""Selection measured without training: how well the picks cover the pool, how alike they are, and what selecting costs.

Quality: Dolly-15k without `summarization`, over 20 sites (Dirichlet 0.5 over the categories). Every strategy picks at
every budget by the real halves of its selection, and the picks are judged in an embedding that no strategy sees: TF-IDF
of the whole row, by truncated SVD 128 values of norm 1. The seed decides split, projection, reduction and draws.
Results are appended to a JSON lines file; tables and plots are made from all of it, where the latest line counts.
Cost: see `benchmarks.selection_cost`.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

import fedhds_client.selection.fedhds as intra
from benchmarks import selection_cost
from benchmarks.selection_quality import CEILING, STRATEGIES, show
from benchmarks.simulation import Outcome, select
from fedhds.spec import STRATEGY_SPECS, ClusteringSpec, Reduction, budget_rows
from fedhds_client.data import prompts
from fedhds_client.data.partition import partition
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.features import extraction, projection, reduction, shard_features
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.projection import FeatureSpace, Pooling
from fedhds_client.models.loading import load_base_model

FloatArray = npt.NDArray[np.float32]
Line = dict[str, Any]

SITES = 20
ALPHA = 0.5
UNSEEN = "summarization"
_BATCH = 16
_EMBEDDING_DIMENSIONS = 128
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def main() -> None:
    """Measures what is asked for, then prints the tables and draws the plots of all that was ever measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["all", "quality", "speed", "report"], default="all")
    parser.add_argument("--data", type=Path, help="Dolly-15k: a file or its folder")
    parser.add_argument("--model", help="base model: a hub id or a path")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="plots go beside it")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/selection-cache"), help="hidden states and reductions"
    )
    parser.add_argument("--rows", type=int, default=None, help="quality: only so many rows of the pool, drawn")
    parser.add_argument(
        "--features",
        nargs="+",
        type=FeatureChoice.parsed,
        default=[
            FeatureChoice(layers, pooling, dimension)
            for dimension in (256, 64)
            for layers in ("all", "last")
            for pooling in POOLINGS
        ],
        metavar="LAYERS/POOLING/DIMENSION[/REDUCTION]",
    )
    parser.add_argument("--strategies", nargs="+", choices=[*STRATEGIES, CEILING], default=[*STRATEGIES, CEILING])
    parser.add_argument("--budgets", nargs="+", default=["0.1%", "0.5%", "1.5%", "3%"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 2000, 4000, 8000, 15000], help="speed: rows")
    parser.add_argument("--threads", type=int, default=2, help="speed: OMP_NUM_THREADS")
    arguments = parser.parse_args()
    if arguments.part != "report" and not (arguments.data and arguments.model):
        parser.error("--data and --model are needed")
    if arguments.data and arguments.data.is_dir():
        arguments.data = next(path for path in sorted(arguments.data.iterdir()) if ".json" in path.name)

    def write(line: Line) -> None:
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    if arguments.part in ("all", "quality"):
        measure_quality(arguments, write)
    if arguments.part in ("all", "speed"):
        selection_cost.measure(arguments.data, arguments.model, arguments.sizes, arguments.threads, write)
    lines = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
    quality = [line for line in lines if line["part"] == "quality"]
    show(quality, SITES, arguments.out.with_name("selection-quality.png"))
    speed = [line for line in lines if line["part"] == "speed"]
    selection_cost.show(speed, arguments.out.with_name("selection-speed.png"))


@dataclass(frozen=True)
class FeatureChoice:
    """What rows are compared by."""

    layers: str
    pooling: Pooling
    dimension: int
    reduction: Reduction = "tsne"

    @classmethod
    def parsed(cls, text: str) -> FeatureChoice:
        """The inverse of str."""
        layers, pooling, dimension, *method = text.split("/")
        reduction_name = next(name for name in REDUCTIONS if name == (method or ["tsne"])[0])
        return cls(layers, next(name for name in POOLINGS if name == pooling), int(dimension), reduction_name)

    def __str__(self) -> str:
        suffix = "" if self.reduction == "tsne" else f"/{self.reduction}"
        return f"{self.layers}/{self.pooling}/{self.dimension}{suffix}"


@dataclass(frozen=True)
class Job:
    """One strategy with one seed, at all budgets: they share the features and, memoized, the reduction."""

    folder: Path
    """The pool's prepared arrays."""
    strategy: str
    choice: FeatureChoice | None
    """None for strategies that do not look at features."""
    seed: int
    budgets: tuple[str, ...]


def measure_quality(arguments: argparse.Namespace, write: Callable[[Line], None]) -> None:
    """Prepares the pool and runs all jobs, the feature choices one after another."""
    folder = prepare(arguments.data, arguments.model, arguments.rows, arguments.cache)
    blind = [strategy for strategy in arguments.strategies if strategy in ("random", CEILING)]
    seeing = [strategy for strategy in arguments.strategies if strategy not in blind]
    kinds = [(strategy, None) for strategy in blind]
    kinds += [(strategy, choice) for choice in arguments.features for strategy in seeing]
    write({"part": "quality", "strategy": "full", **_full(folder)})
    # Two processes with a thread each do more than two threads; t-SNE's threads mostly wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [Job(folder, *kind, seed, tuple(arguments.budgets)) for kind in kinds for seed in arguments.seeds]
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            for line in future.result():
                write({"part": "quality", **line})


def prepare(data: Path, model: str, rows: int | None, cache: Path) -> Path:
    """Folder with the pool's pooled hidden states, judging embedding and categories; made where it is not there."""
    with Shard.open(data) as shard:
        ids = [row.id for row in shard if row.category != UNSEEN]
        if rows is not None:
            ids = sorted(np.random.default_rng(0).choice(ids, rows, replace=False).tolist())
        base = load_base_model(model, device="cpu")
        settings = f"{ids}/{selection_cost.MAX_LENGTH}/{_sources(extraction, projection, prompts, shard_features)}"
        key = hashlib.sha256(f"{base.weights}/{shard.digest}/{settings}".encode()).hexdigest()
        folder = cache / key[:16]
        if (folder / "categories.json").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        prompter = Prompter(base.tokenizer, max_length=selection_cost.MAX_LENGTH)
        hidden, layers = base.model.config.hidden_size, base.model.config.num_hidden_layers + 1
        features = extract_features(
            base.model,
            lambda row: ended(prompter.encode(shard[row]), base.tokenizer.eos_token_id),
            ids,
            PooledStates(0, len(POOLINGS) * layers * hidden),
            pad_id=base.tokenizer.pad_token_id,
            batch_size=_BATCH,
        )
        np.save(folder / "states.npy", features.values.reshape(len(ids), len(POOLINGS), layers, hidden))
        texts = ["\n".join((row.instruction, row.context, row.response)) for row in map(shard.__getitem__, ids)]
        np.save(folder / "embedding.npy", embed(texts))
        # Last: it says that the others are whole.
        (folder / "categories.json").write_text(json.dumps([shard[row].category for row in ids]), encoding="utf-8")
    return folder


def ended(row: Encoded, end: int) -> list[int]:
    """The row's tokens as features are taken of them: a row that was cut ends like all others (ShardFeatures)."""
    return [*row.input_ids[:-1], end] if row.truncated else row.input_ids


@dataclass(frozen=True)
class PooledStates(FeatureSpace):
    """All layers under every pooling, without projection: what every other space can be computed from."""

    def features(
        self,
        states: Mapping[int, torch.Tensor],
        lengths: torch.Tensor,
        centers: Mapping[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """float32 (batch, poolings * layers * hidden)."""
        pools = [replace(self, pooling=pooling) for pooling in POOLINGS]
        return torch.cat([vectors for pool in pools for vectors in pool.pooled(states, lengths).values()], dim=1)


def project(states: FloatArray, space: FeatureSpace) -> FloatArray:
    """Features (n, dimension) of pooled states (n, poolings, layers, hidden): as if of rows of one token."""
    pooled = torch.from_numpy(np.ascontiguousarray(states[:, POOLINGS.index(space.pooling)]))
    layers = {layer: pooled[:, layer, None] for layer in space.layer_indices(pooled.shape[1])}
    features: FloatArray = space.features(layers, torch.ones(len(pooled), dtype=torch.int64)).numpy()
    return features


def embed(texts: list[str]) -> FloatArray:
    """The judging embedding, (n, 128) of norm 1."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    terms = TfidfVectorizer(sublinear_tf=True, min_df=2, stop_words="english").fit_transform(texts)
    reduced = TruncatedSVD(min(_EMBEDDING_DIMENSIONS, terms.shape[1] - 1), random_state=0).fit_transform(terms)
    embedding: FloatArray = normalize(reduced).astype(np.float32)
    return embedding


def run(job: Job) -> list[Line]:
    """The lines of a job, one per budget."""
    torch.set_num_threads(1)
    categories: list[str] = json.loads((job.folder / "categories.json").read_text(encoding="utf-8"))
    embedding: FloatArray = np.load(job.folder / "embedding.npy")
    parts = partition(categories, sites=SITES, by="dirichlet", alpha=ALPHA, min_rows=10, seed=job.seed)
    values = np.zeros((len(categories), 2), dtype=np.float32)
    settings: dict[str, Any] = {"seed": job.seed}
    if job.choice:
        choice = job.choice
        shared = job.strategy != "fedhds"
        space = FeatureSpace(job.seed, choice.dimension, choice.layers, choice.pooling, shared)
        values = project(np.load(job.folder / "states.npy", mmap_mode="r"), space)
        settings |= {"feature_layers": choice.layers, "feature_pooling": choice.pooling}
        if issubclass(STRATEGY_SPECS[job.strategy], ClusteringSpec):
            settings["reduction"] = choice.reduction
    # Names decide draws: these are the names of the recorded lines.
    names = [f"client-{number:02d}" for number in range(SITES)]
    lines = []
    for budget in job.budgets:
        if job.strategy == CEILING:
            picks, traffic = _ceiling(embedding, budget, job.seed), {}
        else:
            shards = {name: values[part] for name, part in zip(names, parts, strict=True)}
            with tempfile.TemporaryDirectory() as folder, _remembered_reduction(job.folder / "reductions"):
                outcome = select(shards, Path(folder), job.strategy, selection_budget=budget, **settings)
            of = dict(zip(names, parts, strict=True))
            picks, traffic = [of[site][row] for site, row in outcome.rows], _traffic(outcome)
        line = {"strategy": job.strategy, "budget": budget, "seed": job.seed}
        line |= {"features": str(job.choice) if job.choice else "", "pool": len(categories)}
        lines.append(line | judged(picks, embedding, categories) | traffic)
    return lines


def judged(picks: list[int], embedding: FloatArray, categories: list[str]) -> Line:
    """The measures of a set of picks."""
    values = embedding[picks]
    among = values @ values.T
    np.fill_diagonal(among, -np.inf)
    pool, picked = Counter(categories), Counter(categories[row] for row in picks)
    apart = sum(abs(pool[name] / len(categories) - picked[name] / len(picks)) for name in pool) / 2
    return {
        "picks": len(picks),
        # Cosine of every row of the pool to the pick that is nearest to it.
        "coverage": round(float((embedding @ values.T).max(axis=1).mean()), 5),
        # Cosine of every pick to the nearest other pick.
        "redundancy": round(float(among.max(axis=1).mean()), 5),
        # Total variation between the categories of the picks and of the pool.
        "balance": round(apart, 5),
    }


def _full(folder: Path) -> Line:
    categories = json.loads((folder / "categories.json").read_text(encoding="utf-8"))
    every = list(range(len(categories)))
    return {"pool": len(every), **judged(every, np.load(folder / "embedding.npy"), categories)}


def _ceiling(embedding: FloatArray, budget: str, seed: int) -> list[int]:
    from sklearn.cluster import KMeans

    count = budget_rows(budget, len(embedding))
    centers = KMeans(count, n_init=1, random_state=seed).fit(embedding).cluster_centers_
    picks = {int(row) for row in (embedding @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T).argmax(0)}
    return sorted(picks)


def _traffic(outcome: Outcome) -> Line:
    """Kilobytes per site: reports that it sent, centers that it got."""
    sent = sum(len(report.SerializeToString()) for _, report in outcome.reports)
    got = sum(centers.nbytes for centers in outcome.centers)
    return {"sent_kb": round(sent / SITES / 1e3, 1), "received_kb": round(got / 1e3, 1)}


def _remembered_reduction(folder: Path) -> Any:
    """Makes strategies take reductions from `folder`, if there: they do not depend on the budget and cost most."""
    folder.mkdir(exist_ok=True)
    made_by = _sources(reduction)

    def remembered(values: FloatArray, method: Reduction, *, seed: int) -> tuple[reduction.FloatArray, str]:
        key = hashlib.sha256(values.tobytes() + f"{values.shape}/{method}/{seed}/{made_by}".encode()).hexdigest()
        file = folder / f"{key}.npy"
        if not file.exists():
            points, note = reduction.reduce(values, method, seed=seed)
            np.save(file, points)
            return points, note
        return np.load(file), ""

    return mock.patch.object(intra, "reduce", remembered)


def _sources(*modules: ModuleType) -> str:
    """A digest that changes when the code does."""
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()


if __name__ == "__main__":
    main()
