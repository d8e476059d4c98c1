"""Sums of masked updates on disk, and the mean of the updates behind one; one tensor of one file in memory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fedhds.errors import AdapterError, StorageError
from fedhds.runtime.files import replacing
from fedhds.secure.masks import MaskStream, Ring, apply_masks
from fedhds.secure.quantization import HEADER_VALUES, WEIGHT_UNIT, Ring32, mean_loss
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter

# Integers of each file at a time.
_BLOCK = 1 << 20


def add_masked(path: Path, updates: Sequence[Path]) -> Artifact:
    """Writes the sum modulo 2^32 of files of as many integers each, uint32 little-endian, to `path`, durably.

    Integers, so no order of the files can matter. Raises StorageError.
    """
    digest, size = hashlib.sha256(), 0
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(update.open("rb")) for update in updates]
        except OSError as error:
            raise StorageError(f"cannot read a masked update: {error}; check the disk and the limits") from error
        with replacing(path) as out:
            while True:
                total = _read(files[0], _BLOCK)
                for file in files[1:]:
                    np.add(total, _read(file, len(total)), out=total)
                if not len(total):
                    return Artifact(digest.hexdigest(), size)
                data = total.astype("<u4", copy=False).tobytes()
                digest.update(data)
                out.write(data)
                size += len(data)


class UnmaskedSum:
    """The sum of updates behind a file of masked ones, read from its beginning to its end."""

    def __init__(self, file: BinaryIO, masks: Sequence[MaskStream]) -> None:
        self._file, self._masks = file, masks

    def take(self, count: int) -> Ring:
        """The next `count` integers, uint32 (count,); raises AdapterError when the file ends before."""
        values = _read(self._file, count)
        if len(values) != count:
            raise AdapterError("the sum of the masked updates is shorter than the adapter")
        apply_masks(values, self._masks)
        return values


def write_mean(
    path: Path,
    total: Path,
    masks: Sequence[MaskStream],
    *,
    ring: Ring32,
    weight: int,
    current: Path,
    manifest: AdapterManifest,
    roles: frozenset[str],
) -> float:
    """Writes the adapter that the mean of the summed updates gives, like one site's update; returns the mean loss.

    `weight` is what the weights of the sites in the sum add up to, `current` the global adapter. Raises AdapterError
    for a sum that no honest sites give: of other weights, or longer than the norm to which each of them clips.
    """
    trained = manifest.only(roles)
    square, values = 0.0, 0
    with ExitStack() as stack:
        unmasked = UnmaskedSum(stack.enter_context(total.open("rb")), masks)
        base = stack.enter_context(AdapterReader(current, manifest))
        said, loss = map(int, unmasked.take(HEADER_VALUES))
        if said != weight:
            raise AdapterError(f"the weights in the sum add up to {said}, those of its sites to {weight}")

        def value(tensor: TensorSpec) -> FloatArray:
            nonlocal square, values
            difference = ring.decode(unmasked.take(math.prod(tensor.shape)), weight)
            square += float(np.square(difference).sum())
            values += len(difference)
            return (base.tensor(tensor) + difference.reshape(tensor.shape)).astype(np.float32)

        write_adapter(path, trained, value, "float32")
    # What rounding can add: less than a step for each site and value.
    slack = ring.sites * math.sqrt(values) / (ring.scale * weight / WEIGHT_UNIT)
    if not math.sqrt(square) <= ring.clip_norm * (1 + 1e-6) + slack:
        raise AdapterError(
            f"the mean of the updates has the norm {math.sqrt(square):.4g}, and each of them was clipped to "
            f"{ring.clip_norm:g}: a site sent what it should not, or one of them another adapter's update"
        )
    return mean_loss(loss, weight)


def _read(file: BinaryIO, count: int) -> Ring:
    return np.frombuffer(bytearray(file.read(4 * count)), dtype="<u4").astype(np.uint32, copy=False)
