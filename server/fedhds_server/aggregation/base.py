"""The interface of aggregators, and what an update must be before one sees it."""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedhds.errors import AdapterError, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterDtype, AdapterReader, write_adapter


@dataclass(frozen=True, slots=True)
class Update:
    """One site's adapter on disk and its weight."""

    site: str
    path: Path
    weight: float


class Aggregator(ABC):
    """Folds updates into the next global adapter.

    Implementations MUST give the same bytes whatever the order in which updates arrive (they come sorted by site) and
    MUST hold one tensor at a time, not one per update. An empty or weightless set of updates changes nothing: the
    result is the global adapter, byte for byte.
    """

    def aggregate(
        self, manifest: AdapterManifest, current: Path, updates: Sequence[Update], out: Path, dtype: AdapterDtype
    ) -> Artifact:
        """Writes the next global adapter to `out`; `current` is the one that the updates started from.

        Raises AdapterError, naming the tensor, for an update that does not fit; StorageError when a file cannot be read
        or written.
        """
        try:
            return self._aggregated(manifest, current, updates, out, dtype)
        except OSError as error:
            raise StorageError(f"cannot aggregate into {out.parent}: {error}; check the disk and the limits") from error

    def _aggregated(
        self, manifest: AdapterManifest, current: Path, updates: Sequence[Update], out: Path, dtype: AdapterDtype
    ) -> Artifact:
        ordered = sorted((update for update in updates if update.weight > 0), key=lambda update: update.site)
        if not ordered:
            shutil.copyfile(current, out)
            return Artifact.of_file(out)
        with ExitStack() as stack:
            readers = [
                stack.enter_context(AdapterReader(update.path, manifest, differences=True)) for update in ordered
            ]
            base = stack.enter_context(AdapterReader(current, manifest))
            weights = np.array([update.weight for update in ordered], dtype=np.float64)

            def folded(spec: TensorSpec) -> FloatArray:
                current = base.tensor(spec)

                def update(index: int) -> FloatArray:
                    values = readers[index].tensor(spec)
                    return current + values if readers[index].is_difference else values

                return self.fold(current, weights / weights.sum(), update)

            return write_adapter(out, manifest, folded, dtype)

    @abstractmethod
    def fold(self, current: FloatArray, shares: np.ndarray, update: Callable[[int], FloatArray]) -> FloatArray:
        """The next value of one tensor: `shares` float64 (n,) sum to 1, `update(i)` reads the i-th update's value."""


def validate_update(path: Path, manifest: AdapterManifest, *, current: Path, largest_norm: float) -> None:
    """Checks names, shapes, types and finiteness; with a `largest_norm` also how far it is from the adapter `current`.

    That is the L2 norm of the difference over all tensors. Raises AdapterError, naming the tensor if there is one.
    """
    square = 0.0
    with ExitStack() as stack, np.errstate(over="ignore"):
        reader = stack.enter_context(AdapterReader(path, manifest, differences=True))
        base = stack.enter_context(AdapterReader(current, manifest)) if largest_norm or reader.is_difference else None
        for spec in manifest.tensors:
            difference = reader.tensor(spec)
            if base is None:
                continue
            start = base.tensor(spec)
            if not reader.is_difference:
                difference = difference - start
            elif not np.isfinite(start + difference).all():
                raise AdapterError(f"{spec.name} holds a difference that leads to values that are not finite")
            square += float(np.square(difference, dtype=np.float64).sum())
    # Written so that a difference too large for a float is rejected too.
    if largest_norm and not math.sqrt(square) <= largest_norm:
        raise AdapterError(
            f"it is {math.sqrt(square):.4g} away from the round's adapter, beyond --max-update-norm {largest_norm:.4g}"
        )
