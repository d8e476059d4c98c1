"""An update on disk becomes integers modulo 2^32 under masks: clipped, weighted, rounded; one tensor in memory."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fedhds.runtime.files import replacing
from fedhds.secure.masks import Ring, apply_masks, uniform
from fedhds.secure.quantization import header
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, TensorSpec
from fedhds.tensors.safetensors import AdapterReader
from fedhds_client.secure.site_round import SiteRound


def write_masked(
    path: Path,
    site_round: SiteRound,
    *,
    update: Path,
    adapter: Path,
    manifest: AdapterManifest,
    roles: frozenset[str],
    loss: float,
) -> tuple[Artifact, float]:
    """Writes what the site adds to the sum, durably; the file's reference, and the norm before clipping.

    The integers (uint32, little-endian) are the weight, the loss, and the difference between `update` and the global
    `adapter` in the tensors whose roles are in `roles`. Raises AdapterError and StorageError.
    """
    ring, weight = site_round.ring, site_round.weight
    trained = manifest.only(roles)
    with ExitStack() as stack:
        new = stack.enter_context(AdapterReader(update, trained))
        base = stack.enter_context(AdapterReader(adapter, manifest))

        def difference(tensor: TensorSpec) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            return (new.tensor(tensor).astype(np.float64) - base.tensor(tensor)).reshape(-1)

        norm = math.sqrt(sum(float(np.square(difference(tensor)).sum()) for tensor in trained.tensors))
        factor = ring.clip_factor(norm)
        noise, masks, digest = site_round.rounding(), site_round.masks(), hashlib.sha256()
        size = 0
        with replacing(path, private=True) as file:

            def add(values: Ring) -> None:
                nonlocal size
                apply_masks(values, masks)
                data = values.astype("<u4", copy=False).tobytes()
                digest.update(data)
                file.write(data)
                size += len(data)

            add(header(weight, loss))
            for tensor in trained.tensors:
                values = difference(tensor) * factor
                add(ring.encode(values, weight, uniform(noise, len(values))))
    return Artifact(digest.hexdigest(), size), norm
