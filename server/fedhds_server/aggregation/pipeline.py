"""From updates on disk to the next global adapter: weights, combination, server optimizer; one group in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fedhds.errors import AdapterError, StorageError
from fedhds.spec import AggregationSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, AdapterWriter, largest_value
from fedhds_server.aggregation.base import Aggregator, FloatArray, Update
from fedhds_server.optimizers.base import ServerOptimizer


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The next global adapter, the optimizer's slots, and the scratch files that hold what is new of them."""

    adapter: Artifact
    slots: Mapping[str, Artifact]
    files: Sequence[tuple[Path, Artifact]]


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
) -> Aggregated:
    """Combines the updates that started from the adapter `current`; what is new is written to `scratch(name)`.

    The result depends on no order of `updates`. Without an update that has a share, adapter and slots stay as they
    are, byte for byte. `slots` holds the optimizer's slots of the round before; a missing one has its first value.
    Raises AdapterError, naming the tensor, for an update that does not fit and for results that are no finite numbers;
    StorageError when a file cannot be read or written.
    """
    try:
        ordered = sorted((update for update in updates if update.share > 0), key=lambda update: update.site)
        if not ordered:
            return _unchanged(current, slots, scratch)
        with ExitStack() as stack:
            base = stack.enter_context(AdapterReader(current, manifest))
            rule = spec.aggregator
            trainable = aggregator.trainable(rule, round_number, manifest.roles)
            trained = manifest.only(trainable)
            readers = [stack.enter_context(AdapterReader(update.path, trained, differences=True)) for update in ordered]
            before = {name: stack.enter_context(AdapterReader(path, manifest)) for name, path in slots.items()}
            paths = {name: scratch(f"slot-{name}") for name in optimizer.slots}
            adapter_path = scratch("aggregate")
            writer = stack.enter_context(AdapterWriter.open(adapter_path, manifest, spec.adapter_dtype))
            slot_writers = {
                name: stack.enter_context(AdapterWriter.open(path, manifest)) for name, path in paths.items()
            }
            shares = aggregator.weights(
                rule,
                ordered,
                lambda index, tensor: (
                    _difference(readers[index], base, tensor)
                    if tensor.role in trainable
                    else np.zeros(tensor.shape, dtype=np.float32)
                ),
            )
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
                    results = aggregator.combine(rule, group, values, shares, partial(_values, readers, values, group))
                    combined.update(zip(group, results, strict=True))
                    del values, results
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
    return Aggregated(writer.artifact, slot_artifacts, files)


def _unchanged(current: Path, slots: Mapping[str, Path], scratch: Callable[[str], Path]) -> Aggregated:
    path = scratch("aggregate")
    shutil.copyfile(current, path)
    adapter = Artifact.of_file(path)
    return Aggregated(adapter, {name: Artifact.of_file(slot) for name, slot in slots.items()}, [(path, adapter)])


def _finite(tensor: TensorSpec, values: FloatArray) -> FloatArray:
    # Sites would be blamed for it: every update of the next round is compared with this adapter.
    if not np.isfinite(values).all():
        raise AdapterError(f"{tensor.name} has values that are not finite")
    return values


def _values(
    readers: Sequence[AdapterReader], current: Sequence[FloatArray], group: Sequence[TensorSpec], index: int
) -> list[FloatArray]:
    reader = readers[index]
    values = [reader.tensor(tensor) for tensor in group]
    return [start + value for start, value in zip(current, values, strict=True)] if reader.is_difference else values


def _difference(reader: AdapterReader, base: AdapterReader, tensor: TensorSpec) -> FloatArray:
    values = reader.tensor(tensor)
    return values if reader.is_difference else values - base.tensor(tensor)
