"""Masks: streams of uniform integers modulo 2^32 from ChaCha20 (RFC 8439), each from a key that serves once."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

Ring = npt.NDArray[np.uint32]

# Values per step: 256 KiB of mask, which stay in a core's cache; measured, larger steps are slower.
_STEP = 1 << 16
_ZEROS = bytes(4 * _STEP)


class MaskStream:
    """The integers modulo 2^32 that follow from a key of 32 bytes, one after the other.

    A key MUST serve one stream alone: two vectors under the same mask give away their difference.
    """

    def __init__(self, key: bytes, *, subtract: bool = False) -> None:
        """With `subtract`, `apply` takes the mask away."""
        self._encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._subtract = subtract

    def apply(self, values: Ring, buffer: bytearray) -> None:
        """Adds the stream's next integers to `values`, uint32 (n,) with n up to 65,536, in place."""
        size = values.nbytes
        self._encryptor.update_into(memoryview(_ZEROS)[:size], memoryview(buffer)[:size])
        mask = np.frombuffer(buffer, dtype="<u4", count=len(values))
        if self._subtract:
            np.subtract(values, mask, out=values)
        else:
            np.add(values, mask, out=values)


def apply_masks(values: Ring, streams: Iterable[MaskStream]) -> None:
    """Adds the next integers of all streams to `values`, uint32 (n,), in place."""
    streams, buffer = list(streams), bytearray(4 * _STEP)
    for begin in range(0, len(values), _STEP):
        part = values[begin : begin + _STEP]
        for stream in streams:
            stream.apply(part, buffer)


def uniform(stream: MaskStream, count: int) -> npt.NDArray[np.float64]:
    """The stream's next `count` integers as multiples of 2^-32 in [0, 1), float64 (count,)."""
    values: Ring = np.zeros(count, dtype=np.uint32)
    apply_masks(values, [stream])
    return values / 2.0**32
