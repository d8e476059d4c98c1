"""Adapters as safetensors files, written and read with one tensor in memory at a time.

The bytes depend on nothing but manifest, values and type, so equal adapters have equal digests.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fedhds.errors import AdapterError
from fedhds.runtime.files import replacing
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.int8 import dequantize, quantize
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec

AdapterDtype = Literal["float32", "bfloat16", "float16"]

_STORED_NAMES: dict[AdapterDtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
}
_FLOATS = tuple(_STORED_NAMES.values())
# Of a header: what `__metadata__` may take, and one entry besides its name and shape, with spaces as others write it.
_METADATA_BYTES, _ENTRY_BYTES, _DIMENSION_BYTES = 4096, 160, 24


def largest_value(dtype: AdapterDtype) -> float:
    """The largest finite value of a type; what is larger becomes infinite in it."""
    return float(ml_dtypes.finfo(_NUMPY_TYPES[_STORED_NAMES[dtype]]).max)  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One array of a file: its name, shape and type in safetensors' words."""

    name: str
    shape: tuple[int, ...]
    stored: str

    @property
    def size(self) -> int:
        return _NUMPY_TYPES[self.stored].itemsize * math.prod(self.shape)


class AdapterWriter:
    """Writes one safetensors file tensor by tensor; several writers may be open side by side."""

    def __init__(self, file: BinaryIO, manifest: AdapterManifest, dtype: AdapterDtype) -> None:
        self._file = file
        self._manifest = manifest
        self._stored = _STORED_NAMES[dtype]
        self._digest = hashlib.sha256()
        self._size = 0
        self._next = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in (entry for spec in manifest.tensors for entry in self._entries(spec)):
            end = offset + entry.size
            header[entry.name] = {
                "dtype": entry.stored,
                "shape": list(entry.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._write(struct.pack("<Q", len(encoded)) + encoded)

    @classmethod
    @contextmanager
    def open(cls, path: Path, manifest: AdapterManifest, dtype: AdapterDtype = "float32") -> Iterator[Self]:
        """Yields a writer whose file takes the place of `path`, durably, when the block ends without an error.

        Raises AdapterError when a tensor is lacking by then, StorageError when the file cannot be written.
        """
        with replacing(path) as file:
            writer = cls(file, manifest, dtype)
            yield writer
            if lacking := manifest.tensors[writer._next :]:
                raise AdapterError(f"{lacking[0].name} was not written")

    @property
    def artifact(self) -> Artifact:
        """What has been written so far; after the block, the file."""
        return Artifact(self._digest.hexdigest(), self._size)

    def add(self, spec: TensorSpec, values: FloatArray) -> None:
        """Writes the manifest's next tensor, float32; raises AdapterError for another one or another shape."""
        if self._manifest.tensors[self._next : self._next + 1] != (spec,):
            raise AdapterError(f"{spec.name} is not the next tensor of the manifest")
        if values.shape != spec.shape:
            raise AdapterError(f"{spec.name} has shape {values.shape}, the manifest says {spec.shape}")
        for entry, array in zip(self._entries(spec), self._arrays(spec, values), strict=True):
            self._write(array.astype(_NUMPY_TYPES[entry.stored], copy=False).tobytes())
        self._next += 1

    def _entries(self, spec: TensorSpec) -> tuple[_Entry, ...]:
        return (_Entry(spec.name, spec.shape, self._stored),)

    def _arrays(self, spec: TensorSpec, values: FloatArray) -> tuple[npt.NDArray[Any], ...]:
        return (values,)

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)
        self._size += len(data)


class DifferenceWriter(AdapterWriter):
    """Writes the difference to the global adapter in int8 with float32 scales, as each tensor's `scale_axis` says.

    `add` raises AdapterError also for values that are not finite.
    """

    def _entries(self, spec: TensorSpec) -> tuple[_Entry, ...]:
        return _difference_entries(spec)

    def _arrays(self, spec: TensorSpec, values: FloatArray) -> tuple[npt.NDArray[Any], ...]:
        if not np.isfinite(values).all():
            raise AdapterError(f"{spec.name} holds values that are not finite")
        return quantize(values, spec.scale_axis)


def _difference_entries(spec: TensorSpec) -> tuple[_Entry, _Entry]:
    return _Entry(spec.name, spec.shape, "I8"), _Entry(spec.scales_name, spec.scales_shape, "F32")


def write_adapter(
    path: Path, manifest: AdapterManifest, tensor: Callable[[TensorSpec], FloatArray], dtype: AdapterDtype
) -> Artifact:
    """Writes a safetensors file durably, asking `tensor` for one float32 array after the other.

    The file appears under `path` only when it is complete. Raises AdapterError when an array has another shape,
    StorageError when the file cannot be written.
    """
    with AdapterWriter.open(path, manifest, dtype) as writer:
        for spec in manifest.tensors:
            writer.add(spec, tensor(spec))
    return writer.artifact


def write_difference(path: Path, manifest: AdapterManifest, difference: Callable[[TensorSpec], FloatArray]) -> Artifact:
    """Writes an update as its difference to the global adapter in int8; otherwise like `write_adapter`.

    Raises AdapterError also for values that are not finite.
    """
    with DifferenceWriter.open(path, manifest) as writer:
        for spec in manifest.tensors:
            writer.add(spec, difference(spec))
    return writer.artifact


class AdapterReader:
    """A safetensors adapter on disk, read tensor by tensor; a context manager.

    Opening checks the header against `manifest`; `tensor` checks the values. Nothing else is trusted: the file
    may come from a faulty or hostile site. Raises AdapterError, naming the tensor at fault. With `differences` the file
    may be what `write_difference` makes; `is_difference` says whether it is.
    """

    def __init__(self, path: Path, manifest: AdapterManifest, *, differences: bool = False) -> None:
        # Read and not mapped: pages of a mapping count as the process's own, for every update of a round.
        self._file = path.open("rb", buffering=0)
        try:
            self._start, header = _header(self._file, _max_header(manifest))
            self.is_difference = differences and manifest.tensors[0].scales_name in header
            payload = os.fstat(self._file.fileno()).st_size - self._start
            self._entries = _checked_entries(header, manifest, payload, self.is_difference)
        except AdapterError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def tensor(self, spec: TensorSpec) -> FloatArray:
        """One tensor as float32, a copy; raises AdapterError when it holds a value that is not finite."""
        values = self._array(spec.name)
        if self.is_difference:
            scales = self._array(spec.scales_name)
            if not (np.isfinite(scales) & (scales > 0)).all():
                raise AdapterError(f"{spec.name} has scales that are not finite and above 0")
            with np.errstate(over="ignore"):
                values = dequantize(values, scales, spec.scale_axis)
        values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise AdapterError(f"{spec.name} holds values that are not finite")
        return values

    def _array(self, name: str) -> npt.NDArray[Any]:
        entry, begin = self._entries[name]
        values = np.empty(entry.shape, _NUMPY_TYPES[entry.stored])
        unread, at = memoryview(values.view(np.uint8).reshape(-1).data), self._start + begin
        # In parts: one call reads no more than 2 GiB.
        while count := os.preadv(self._file.fileno(), [unread], at):
            unread, at = unread[count:], at + count
        if unread:
            raise AdapterError(f"{name} ends before its last byte: the file was cut after it was opened")
        return values


def file_sizes(manifest: AdapterManifest, dtype: AdapterDtype | None) -> range:
    """Sizes in bytes that a file with the manifest's tensors may have; `dtype` None: with differences in int8."""
    if dtype is None:
        entries = [entry for spec in manifest.tensors for entry in _difference_entries(spec)]
    else:
        entries = [_Entry(spec.name, spec.shape, _STORED_NAMES[dtype]) for spec in manifest.tensors]
    payload = 8 + sum(entry.size for entry in entries)
    return range(payload, payload + _max_header(manifest) + 1)


def _max_header(manifest: AdapterManifest) -> int:
    """Bytes of the longest header that a file with the manifest's tensors, or with differences to them, may have."""
    return _METADATA_BYTES + sum(
        len(json.dumps(name)) + _ENTRY_BYTES + _DIMENSION_BYTES * len(spec.shape)
        for spec in manifest.tensors
        for name in (spec.name, spec.scales_name)
    )


def _header(file: FileIO, max_length: int) -> tuple[int, dict[str, Any]]:
    """Where the tensor bytes start, and the header's entries as they stand there."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise AdapterError("the adapter file is shorter than a safetensors header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(max_length, size - 8):
        raise AdapterError("the adapter file's header is longer than the file or than the run's tensors need")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise AdapterError("the adapter file's header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterError("the adapter file's header is not a JSON object")
    header.pop("__metadata__", None)
    return 8 + length, header


def _checked_entries(
    header: dict[str, Any], manifest: AdapterManifest, payload: int, is_difference: bool
) -> dict[str, tuple[_Entry, int]]:
    """Every array by name, with the offset of its bytes; `payload` is the number of bytes after the header."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    if is_difference:
        parts = [entry for spec in manifest.tensors for entry in _difference_entries(spec)]
        expected = {entry.name: (entry.shape, (entry.stored,)) for entry in parts}
    else:
        expected = {spec.name: (spec.shape, _FLOATS) for spec in manifest.tensors}
    if header.keys() != expected.keys():
        odd = sorted(set(header) ^ set(expected))
        raise AdapterError(f"tensors differ from the run's manifest, {len(odd)} of them; the first is {odd[0][:200]!r}")
    entries: dict[str, tuple[_Entry, int]] = {}
    for name, (shape, types) in expected.items():
        match header[name]:
            case {"dtype": str(stored), "shape": list(given), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise AdapterError(f"the header's entry for {name} is malformed")
        if tuple(given) != shape:
            # What the file says may be anything, of any length: it is shown escaped and abbreviated.
            raise AdapterError(f"{name} has shape {reprlib.repr(tuple(given))}, the run's manifest says {shape}")
        if stored not in types:
            travels = " or ".join(", ".join(types).rsplit(", ", 1))
            raise AdapterError(f"{name} has type {reprlib.repr(stored)}; adapters travel as {travels}")
        entry = _Entry(name, shape, stored)
        if not 0 <= begin <= end <= payload or end - begin != entry.size:
            raise AdapterError(f"{name} has byte offsets that do not fit its shape or the file")
        entries[name] = (entry, begin)
    return entries
