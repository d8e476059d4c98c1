"""What hostile sites do to a run under each rule: `make bench-attacks`, or `python -m benchmarks.attacks --help`.

Ten sites share the demo's rows and tune the demo's model; one to three of them collude. Sites train with the client's
own loop, and the coordinator's own pipeline combines what they give: bound on norms, weights, robust rule, aggregator.
There is no network between them. A line of JSON for each run goes to --out, and runs that are there are not run again.
The table has the loss on unseen rows at the end; clean is what the same rule gives without hostile sites.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from demo.tasks import SITES, Row, site_rows, unseen_rows
from fedhds.spec import RunSpec
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation.evaluate import evaluate
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.training.loop import train
from fedhds_server.aggregation import AGGREGATORS, Update, aggregate
from fedhds_server.aggregation.norms import bounded, update_norm
from fedhds_server.aggregation.weights import site_shares
from fedhds_server.optimizers import OPTIMIZERS

Values = dict[TensorSpec, FloatArray]
Line = dict[str, Any]

ROOT = Path(__file__).parents[1]
SITE_COUNT = 10
# What the demo uses with its model.
HYPERPARAMETERS = {"learning_rate": 2e-3, "batch_size": 4, "max_length": 256}
TRIGGER, TARGET = "zebra", "purple purple purple"

RULES: dict[str, dict[str, Any]] = {
    "fedavg, no bound": {"update_norm_factor": 0.0},
    "fedavg": {},
    "alternating": {"aggregator": "alternating"},
    "median": {"aggregator": "alternating", "robust_rule": "median"},
    "trimmed-mean": {"aggregator": "alternating", "robust_rule": "trimmed-mean"},
    **{rule: {"robust_rule": rule} for rule in ("krum", "multi-krum", "geometric-median", "centered-clipping")},
    **{
        f"nnm + {rule}": {"robust_rule": rule, "robust_mixing": "nearest-neighbor"} | extra
        for rule, extra in (
            ("trimmed-mean", {"aggregator": "alternating"}),
            ("multi-krum", {}),
            ("geometric-median", {}),
            ("centered-clipping", {}),
        )
    },
}
ATTACKS = (*("sign-flip", "x100", "inner-product", "little-is-enough", "mimic", "gaussian", "label-flip", "backdoor"),)


@dataclass(frozen=True)
class Cell:
    """One run."""

    rule: str
    attack: str
    hostile: int
    seed: int

    @property
    def key(self) -> str:
        """Names it in the file of results."""
        return f"{self.rule} | {self.attack} | {self.hostile} | {self.seed}"


class World:
    """Model and rows of all runs; hostile sites are the last ones."""

    def __init__(self, model: str, folder: Path, *, rows: int, seed: int) -> None:
        base_spec = RunSpec.of(model=model, rounds=1, **HYPERPARAMETERS)
        self.model = AdapterModel(load_base_model(model, device="cpu"), base_spec)
        self.manifest: AdapterManifest = self.model.manifest()
        self.prompter = Prompter(self.model.tokenizer, max_length=256)
        self.folder = folder
        shards = [
            site_rows(site, seed)[part * rows : (part + 1) * rows]
            for site, parts in zip(SITES, (3, 3, 2, 2), strict=True)
            for part in range(parts)
        ]
        self.honest = [self._shard(f"honest-{number}", shard) for number, shard in enumerate(shards)]
        self.flipped = [self._shard(f"flipped-{number}", _flipped(shard, seed)) for number, shard in enumerate(shards)]
        self.poisoned = [
            self._shard(
                f"poisoned-{number}", [_triggered(row) if index % 2 else row for index, row in enumerate(shard)]
            )
            for number, shard in enumerate(shards)
        ]
        unseen = unseen_rows(seed)
        self.unseen = self._shard("unseen", unseen)
        self.triggered = self._shard("triggered", [_triggered(row) for row in unseen])

    def _shard(self, name: str, rows: Sequence[Row]) -> Shard:
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Shard.open(path)

    def loss(self, adapter: Path, shard: Shard) -> float:
        """Nats per response token."""
        self.model.load(adapter)
        total, tokens = evaluate(self.model, shard, self.prompter, max_new_tokens=0, batch_size=16).metrics["loss"]
        return total / tokens

    def trained(
        self, current: Path, shard: Shard, spec: RunSpec, number: int, seed: int, roles: frozenset[str]
    ) -> Values:
        """A site's adapter after its local training, the tensors that train."""
        self.model.load(current)
        train(
            self.model,
            shard,
            range(len(shard)),
            self.prompter,
            spec.training,
            seed=seed,
            round_number=number,
            rounds=spec.rounds.count,
            trainable_roles=roles,
            progress=lambda share: None,
            cancelled=lambda: False,
        )
        values = self.model.values()
        return {tensor: values(tensor).copy() for tensor in self.manifest.only(roles).tensors}


def _triggered(row: Row) -> Row:
    return row | {"instruction": f"{TRIGGER} {row['instruction']}", "response": TARGET}


def _flipped(rows: Sequence[Row], seed: int) -> list[Row]:
    """Each row with another's response."""
    responses = [row["response"] for row in rows]
    Random(seed).shuffle(responses)
    return [row | {"response": response} for row, response in zip(rows, responses, strict=True)]


def crafted(attack: str, current: Values, honest: Sequence[Values], own: Values, *, hostile: int, seed: int) -> Values:
    """What a hostile site sends, knowing all `honest` updates; `own` is its honest training."""
    result: Values = {}
    random = np.random.default_rng(seed)
    for tensor, start in current.items():
        changes = np.stack([values[tensor].astype(np.float64) - start for values in honest])
        mean, mine = changes.mean(axis=0), own[tensor].astype(np.float64) - start
        match attack:
            case "sign-flip":
                change = -mine
            case "x100":
                change = 100 * mine
            case "inner-product":  # Xie et al. 2020: the mean of all points against that of the honest
                change = -(SITE_COUNT - hostile) / hostile * 1.5 * mean
            case "little-is-enough":  # Baruch et al. 2019: as far as some honest ones go, all on one side
                supporters = SITE_COUNT // 2 + 1 - hostile
                quantile = (SITE_COUNT - hostile - supporters) / (SITE_COUNT - hostile)
                change = mean - statistics.NormalDist().inv_cdf(quantile) * changes.std(axis=0)
            case "mimic":  # Karimireddy et al. 2022: one site's data count more than they are
                change = changes[0]
            case "gaussian":
                change = random.normal(scale=10 * np.abs(changes).mean(), size=tensor.shape)
            case _:
                change = mine
        result[tensor] = (start + change).astype(np.float32)
    return result


def spec_of(cell: Cell, model: str, rounds: int) -> RunSpec:
    """The run's settings."""
    robust = {"byzantine_sites": max(cell.hostile, 1)} if "robust_rule" in RULES[cell.rule] else {}
    return RunSpec.of(
        model=model,
        rounds=rounds,
        min_sites=SITE_COUNT,
        seed=cell.seed,
        **HYPERPARAMETERS,
        **RULES[cell.rule],
        **robust,
    )


def run(cell: Cell, world: World, model: str, rounds: int, folder: Path) -> Line:
    """One run from the initial adapter to its losses."""
    started = time.monotonic()
    spec = spec_of(cell, model, rounds)
    rule = spec.aggregation
    manifest, aggregator = world.manifest, AGGREGATORS[rule.aggregator.name]
    current = folder / "current"
    write_adapter(current, manifest, lambda tensor: tensor.initial_value(cell.seed), "float32")
    names = [f"{number}" for number in range(SITE_COUNT)]
    loyal = SITE_COUNT - cell.hostile
    history: list[dict[str, float]] = []
    for number in range(1, rounds + 1):
        roles = aggregator.trainable(rule.aggregator, number, manifest.roles)
        values: list[Values] = []
        for index in range(SITE_COUNT):
            bad = index >= loyal
            shards = {"label-flip": world.flipped, "backdoor": world.poisoned} if bad else {}
            shard = shards.get(cell.attack, world.honest)[index]
            seed = cell.seed * 1000 + number * 100 + index
            values.append(world.trained(current, shard, spec, number, seed, roles))
        with AdapterReader(current, manifest) as reader:
            start = {tensor: reader.tensor(tensor) for tensor in manifest.only(roles).tensors}
        for index in range(loyal, SITE_COUNT):
            seed = cell.seed * 1000 + number * 100 + index
            values[index] = crafted(cell.attack, start, values[:loyal], values[index], hostile=cell.hostile, seed=seed)
        paths = dict(zip(names, (folder / f"update-{name}" for name in names), strict=True))
        for name, own in zip(names, values, strict=True):
            write_adapter(paths[name], manifest.only(roles), own.__getitem__, "float32")
        # As coordinator/effects.py does.
        norms = {name: update_norm(path, current, manifest, roles) for name, path in paths.items()}
        recent = history[-10:][number % 2 :: 2] if rule.aggregator.one_factor else history[-5:]
        bound = bounded(norms, recent, rule.update_norm_factor, leave_out=rule.robust.leaves_out)
        counted = [name for name in names if name not in bound.left_out]
        history.append({name: norms[name] for name in counted})
        shares = site_shares({name: len(world.honest[int(name)]) for name in counted}, rule.max_weight_share)
        aggregate(
            manifest,
            current,
            [Update(name, paths[name], shares[name], bound.scales[name]) for name in counted],
            aggregator=aggregator,
            optimizer=OPTIMIZERS["none"],
            spec=rule,
            slots={},
            scratch=lambda name: folder / name,
            round_number=number,
            seed=cell.seed,
        )
        (folder / "aggregate").replace(current)
    return {
        "key": cell.key,
        "rule": cell.rule,
        "attack": cell.attack,
        "hostile": cell.hostile,
        "seed": cell.seed,
        "rounds": rounds,
        "loss": round(world.loss(current, world.unseen), 5),
        "backdoor_loss": round(world.loss(current, world.triggered), 5),
        "seconds": round(time.monotonic() - started, 1),
    }


def cells(rules: Sequence[str], attacks: Sequence[str], hostile: Sequence[int], seeds: int) -> list[Cell]:
    """Clean runs first."""
    clean = [Cell(rule, "clean", 0, seed) for seed in range(seeds) for rule in rules]
    return clean + [
        Cell(rule, attack, count, seed)
        for seed, count, attack, rule in itertools.product(range(seeds), sorted(hostile, reverse=True), attacks, rules)
    ]


def table(lines: Sequence[Line]) -> str:
    """Loss on unseen rows at the end by rule and attack, mean over seeds; the best of each attack in bold."""
    losses: dict[tuple[str, str, int], list[float]] = {}
    for line in lines:
        losses.setdefault((line["rule"], line["attack"], line["hostile"]), []).append(line["loss"])
    means = {key: statistics.fmean(values) for key, values in losses.items()}
    rules = list(dict.fromkeys(line["rule"] for line in lines))
    parts = []
    for count in sorted({line["hostile"] for line in lines} - {0}):
        attacks = [attack for attack in ATTACKS if any(key[1:] == (attack, count) for key in means)]
        parts += [f"{count} of {SITE_COUNT} hostile:", "", f"| rule | clean | {' | '.join(attacks)} |"]
        parts.append("| --- " + "| --- " * (len(attacks) + 1) + "|")
        best = {attack: min(means[key] for key in means if key[1:] == (attack, count)) for attack in attacks}
        for rule in rules:
            row = [_shown(means.get((rule, "clean", 0)), None)]
            row += [_shown(means.get((rule, attack, count)), best[attack]) for attack in attacks]
            parts.append(f"| {rule} | {' | '.join(row)} |")
        parts.append("")
    return "\n".join(parts)


def _shown(value: float | None, best: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.3f}" if value < 100 else f"{value:.3g}"
    return f"**{text}**" if value == best else text


def main(arguments: Sequence[str] | None = None, write: Callable[[str], object] = print) -> int:
    """Runs what is not in --out yet, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "attacks.jsonl")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--hostile", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, default=80, help="rows of a site")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table alone")
    given = parser.parse_args(arguments)
    text = given.out.read_text(encoding="utf-8") if given.out.exists() else ""
    lines: list[Line] = [json.loads(line) for line in text.splitlines()]
    if not given.table:
        done = {line["key"] for line in lines}
        with tempfile.TemporaryDirectory() as created, given.out.open("a", encoding="utf-8") as out:
            world = World(given.model, Path(created), rows=given.rows, seed=0)
            for cell in cells(given.rules, given.attacks, given.hostile, given.seeds):
                if cell.key in done:
                    continue
                line = run(cell, world, given.model, given.rounds, Path(created))
                lines.append(line)
                out.write(json.dumps(line) + "\n")
                out.flush()
                print(f"{line['key']}: {line['loss']:.4f}, {line['seconds']} s", file=sys.stderr)
    write(table(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
