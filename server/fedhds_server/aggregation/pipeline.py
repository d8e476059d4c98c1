"""From updates on disk to the next global adapter: weights, robust rule, combination, server optimizer.

One group of tensors is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedhds.errors import AdapterError, StorageError
from fedhds.spec import AggregationSpec
from fedhds.spec.robust import ActiveRobustSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, AdapterWriter, largest_value
from fedhds_server.aggregation.base import Aggregator, FloatArray, Shares, Update
from fedhds_server.aggregation.geometry import geometry
from fedhds_server.aggregation.robust import ROBUST_RULES, CoordinateRule, DistanceRule, mixing_matrix
from fedhds_server.aggregation.scores import Score, scores_of
from fedhds_server.optimizers.base import ServerOptimizer, rounded
from fedhds_server.run.parties import parties

# Values of each update that a rule by coordinate takes at a time, in float64.
_COORDINATES = 1 << 16
# Below this, a weight is what rounding leaves of zero.
_NOTHING = 1e-9


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The next global adapter, the optimizer's slots, and the scratch files that hold what is new of them.

    `gap` is how far the mean of LoRA's factors is from the mean of their products, relative to the latter; None where
    not both are averaged. `scores` has a score for each update that counts. `refused` says why nothing was combined.
    """

    adapter: Artifact
    slots: Mapping[str, Artifact]
    files: Sequence[tuple[Path, Artifact]]
    gap: float | None = None
    scores: Mapping[str, Score] = field(default_factory=dict)
    refused: str = ""


def aggregate(
    manifest: AdapterManifest,
    current: Path,
    updates: Sequence[Update],
    *,
    aggregator: Aggregator,
    optimizer: ServerOptimizer,
    spec: AggregationSpec,
    slots: Mapping[str, Path],
    scratch: Callable[[str], Path],
    round_number: int,
    seed: int = 0,
) -> Aggregated:
    """Combines the updates that started from the adapter `current`; what is new is written to `scratch(name)`.

    The result depends on no order of `updates`. Without an update that has a share, adapter and slots stay as they
    are, byte for byte, and also when fewer parties sent one than the robust rule needs. `slots` holds the optimizer's
    slots of the round before; a missing one has its first value.
    Raises AdapterError, naming the tensor, for an update that does not fit and for results that are no finite numbers;
    StorageError when a file cannot be read or written.
    """
    try:
        ordered = sorted((update for update in updates if update.share > 0), key=lambda update: update.site)
        if not ordered:
            return _unchanged(current, slots, scratch)
        voters = len(parties(update.site for update in ordered))
        if isinstance(spec.robust, ActiveRobustSpec) and voters < spec.robust.least_parties:
            refused = f"{spec.robust.condition}, {voters} sent an update"
            return _unchanged(current, slots, scratch, refused)
        with ExitStack() as stack:
            base = stack.enter_context(AdapterReader(current, manifest))
            rule = spec.aggregator
            trainable = aggregator.trainable(rule, round_number, manifest.roles)
            trained = manifest.only(trainable)
            opened = [
                _OpenUpdate(stack.enter_context(AdapterReader(update.path, trained, differences=True)), update.scale)
                for update in ordered
            ]
            before = {name: stack.enter_context(AdapterReader(path, manifest)) for name, path in slots.items()}
            paths = {name: scratch(f"slot-{name}") for name in optimizer.slots}
            adapter_path = scratch("aggregate")
            writer = stack.enter_context(AdapterWriter.open(adapter_path, manifest, spec.adapter_dtype))
            slot_writers = {
                name: stack.enter_context(AdapterWriter.open(path, manifest)) for name, path in paths.items()
            }
            start = lru_cache(maxsize=2)(base.tensor)

            def difference(index: int, tensor: TensorSpec) -> FloatArray:
                if tensor.role not in trainable:
                    return np.zeros(tensor.shape, dtype=np.float32)
                return opened[index].difference(tensor, start(tensor))

            shares = aggregator.weights(rule, ordered, difference)
            measured = geometry(manifest.tensors, frozenset(trained.tensors), start, difference, shares)
            combine = _combination(aggregator, spec, opened, ordered, shares, measured.gram, round_number, seed)
            groups = {group[0]: group for group in aggregator.groups(trained.tensors)}
            # What is combined of a group whose tensors are not all written yet.
            combined: dict[TensorSpec, FloatArray] = {}
            largest = np.float32(largest_value(spec.adapter_dtype))
            for tensor in manifest.tensors:
                value = base.tensor(tensor)
                old = {
                    name: before[name].tensor(tensor)
                    if name in before
                    else np.full(tensor.shape, optimizer.initial(spec.optimizer, name), dtype=np.float32)
                    for name in optimizer.slots
                }
                new: tuple[FloatArray, Mapping[str, FloatArray]] = value, old
                if tensor in groups:
                    group = groups[tensor]
                    values = [value, *(base.tensor(other) for other in group[1:])]
                    combined.update(zip(group, combine(group, values), strict=True))
                    del values
                if tensor in combined:
                    new = optimizer.step(spec.optimizer, value, combined.pop(tensor), old, round_number)
                # A step may go beyond the updates, and so beyond what the adapter's type holds.
                writer.add(tensor, _finite(tensor, np.clip(new[0], -largest, largest)))
                for name, slot_writer in slot_writers.items():
                    slot_writer.add(tensor, _finite(tensor, new[1][name]))
    except OSError as error:
        raise StorageError(
            f"cannot aggregate into {scratch('').parent}: {error}; check the disk and the limits"
        ) from error
    slot_artifacts = {name: slot_writer.artifact for name, slot_writer in slot_writers.items()}
    files = [(adapter_path, writer.artifact), *((paths[name], slot_artifacts[name]) for name in paths)]
    scores = scores_of([update.site for update in ordered], measured.gram, shares)
    # Other rules than FedAvg's keep one factor or the product.
    gap = measured.gap if rule.averages_factors else None
    return Aggregated(writer.artifact, slot_artifacts, files, gap, scores)


Combine = Callable[[Sequence[TensorSpec], Sequence[FloatArray]], Sequence[FloatArray]]
"""The combined values of a group's tensors, given the global adapter's."""


def _combination(
    aggregator: Aggregator,
    spec: AggregationSpec,
    opened: Sequence[_OpenUpdate],
    updates: Sequence[Update],
    shares: Shares,
    gram: npt.NDArray[np.float64],
    round_number: int,
    seed: int,
) -> Combine:
    """How the run combines a group: the aggregator's way, with weights of the robust rule, or value by value."""
    robust = spec.robust
    weights = shares
    if isinstance(robust, ActiveRobustSpec):
        sites = [update.site for update in updates]
        mixing = mixing_matrix(robust, sites, shares, gram, seed=seed, round_number=round_number)
        rule = ROBUST_RULES[robust.rule]
        if isinstance(rule, CoordinateRule):
            by_value = rule
            return lambda group, current: [
                _by_coordinate(by_value, robust, mixing, [update.value(tensor, value) for update in opened])
                for tensor, value in zip(group, current, strict=True)
            ]
        if isinstance(rule, DistanceRule):
            weights = rule.weights(robust, mixing @ gram @ mixing.T) @ mixing
    used = [index for index, weight in enumerate(weights) if weight > 0]
    # What a rule leaves is the global adapter's.
    rest = 0.0 if weights is shares else float(1 - weights.sum())
    counted = [float(weights[index]) for index in used]
    if rest > _NOTHING:
        counted.append(rest)

    def combine(group: Sequence[TensorSpec], current: Sequence[FloatArray]) -> Sequence[FloatArray]:
        def values(place: int) -> Sequence[FloatArray]:
            if place == len(used):
                return current
            update = opened[used[place]]
            return [update.value(tensor, start) for tensor, start in zip(group, current, strict=True)]

        return aggregator.combine(spec.aggregator, group, current, np.array(counted), values)

    return combine


def _by_coordinate(
    rule: CoordinateRule,
    parameters: ActiveRobustSpec,
    mixing: npt.NDArray[np.float64],
    values: Sequence[FloatArray],
) -> FloatArray:
    flat = [value.reshape(-1) for value in values]
    result = np.empty(flat[0].shape, dtype=np.float32)
    for start in range(0, len(result), _COORDINATES):
        block = np.stack([value[start : start + _COORDINATES] for value in flat]).astype(np.float64)
        result[start : start + _COORDINATES] = rounded(rule.combine(parameters, mixing @ block))
    return result.reshape(values[0].shape)


def _unchanged(
    current: Path, slots: Mapping[str, Path], scratch: Callable[[str], Path], refused: str = ""
) -> Aggregated:
    path = scratch("aggregate")
    shutil.copyfile(current, path)
    adapter = Artifact.of_file(path)
    kept = {name: Artifact.of_file(slot) for name, slot in slots.items()}
    return Aggregated(adapter, kept, [(path, adapter)], refused=refused)


def _finite(tensor: TensorSpec, values: FloatArray) -> FloatArray:
    # Sites would be blamed for it: every update of the next round is compared with this adapter.
    if not np.isfinite(values).all():
        raise AdapterError(f"{tensor.name} has values that are not finite")
    return values


@dataclass(frozen=True, slots=True)
class _OpenUpdate:
    """An update that is read tensor by tensor; of its difference to the global adapter, `scale` counts."""

    reader: AdapterReader
    scale: float

    def value(self, tensor: TensorSpec, current: FloatArray) -> FloatArray:
        """Its value of a tensor, given the global adapter's."""
        if self.scale == 1 and not self.reader.is_difference:
            return self.reader.tensor(tensor)
        return current + self.difference(tensor, current)

    def difference(self, tensor: TensorSpec, current: FloatArray) -> FloatArray:
        """What it adds to the global adapter's value of a tensor."""
        values = self.reader.tensor(tensor)
        if self.scale == 1:
            return values if self.reader.is_difference else values - current
        change = values.astype(np.float64)
        if not self.reader.is_difference:
            change -= current
        return rounded(change * self.scale)
