"""What a run would cost a site in epsilon, worked out from the run's settings alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fedhds.privacy.accountant import Cost, calibrate, epsilon_of
from fedhds.privacy.ledger import Unit
from fedhds.spec import RunSpec
from fedhds_client.stated_rows import rows_noise
from fedhds_client.training.batches import steps_of


@dataclass(frozen=True)
class PlannedRelease:
    """What leaves in the run, all rounds together."""

    release: str
    unit: Unit
    cost: Cost
    epsilon: float
    """Alone."""


@dataclass(frozen=True)
class Plan:
    """The releases of a run, and epsilon of them together in each privacy unit."""

    releases: tuple[PlannedRelease, ...]
    epsilon: dict[Unit, float]
    delta: float
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an epsilon that is infinite is null."""
        finite = {unit: epsilon if math.isfinite(epsilon) else None for unit, epsilon in self.epsilon.items()}
        releases = [
            {**asdict(each), "epsilon": each.epsilon if math.isfinite(each.epsilon) else None} for each in self.releases
        ]
        return {"releases": releases, "epsilon": finite, "delta": self.delta, "notes": list(self.notes)}


def planned(spec: RunSpec, rows: int) -> Plan:
    """The cost for a site that takes part in every round with `rows` rows, once it has told how many it has."""
    selection, training, strategy = spec.privacy.selection, spec.privacy.training, spec.selection.strategy
    delta = (
        min(selection.delta, training.delta)
        if selection.noised and training.noised
        else (training.delta if training.noised else selection.delta)
    )
    costs: list[tuple[str, Unit, Cost]] = []
    notes = []
    selections = 1 if spec.selection.one_shot else spec.rounds.count
    if spec.selection.filters:
        steps = len(spec.selection.filter_names) * selections
        costs.append(("counts of filters", "example", Cost(selection.noise_multiplier, steps=steps)))
    if strategy.privacy_unit is not None:
        steps = strategy.releases(spec) * selections
        costs.append((strategy.released, strategy.privacy_unit, Cost(selection.noise_multiplier, steps=steps)))
    if noise := rows_noise(spec):
        costs.append(("number of rows", "example", Cost(noise)))
    if training.noised:
        rate, steps = min(1.0, spec.training.batch_size / rows), steps_of(spec.training, rows) * spec.rounds.count
        replaced = strategy.pick_change == "one"
        multiplier: float | None = training.noise_multiplier
        if training.epsilon:
            spent = [cost for _, unit, cost in costs if unit == "example"]
            multiplier = calibrate(
                epsilon=training.epsilon,
                delta=training.delta,
                sample_rate=rate,
                steps=steps,
                replaced=replaced,
                spent=spent,
            )
        if multiplier is None:
            notes.append(f"no noise on training keeps within epsilon {training.epsilon:g}: selection alone costs more")
        costs.append(("adapters", "example", Cost(multiplier or 0.0, rate, steps, replaced)))
        if not spec.aggregation.aggregator.one_factor:
            notes.append("noise on both factors of LoRA multiplies: --aggregator ffa or alternating keep it linear")
    else:
        notes.append("adapters are trained without noise: no epsilon covers them")
    made = tuple(PlannedRelease(name, unit, cost, epsilon_of([cost], delta=delta)) for name, unit, cost in costs)
    units: dict[Unit, float] = {
        unit: epsilon_of([each.cost for each in made if each.unit == unit], delta=delta)
        for unit in dict.fromkeys(each.unit for each in made)
    }
    return Plan(made, units, delta, tuple(notes))
