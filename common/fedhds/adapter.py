"""Adapter tensors: manifest, safetensors codec, first values and validation, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fedhds.errors import AdapterError, StorageError
from fedhds.quantisation import dequantised, quantised
from fedhds.runspec import AdapterDtype, RunSpec
from fedhds.v1 import federation_pb2 as pb

FloatArray = npt.NDArray[np.float32]

_SAFETENSORS_NAMES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
}
_FLOATS = tuple(_SAFETENSORS_NAMES.values())
# A header lists names and offsets only; adapters of the largest models stay far below this.
_LARGEST_HEADER = 64 << 20
# Values of one factor: the highest rank, 1024, times a million features, which no known model has.
_LARGEST_TENSOR = 1 << 30
# Names stand in logs and journals.
_LONGEST_NAME = 500


@dataclass(frozen=True, slots=True)
class Artifact:
    """Bytes named by what they hold: `digest` is their SHA-256 in hexadecimal, `size` their length in bytes."""

    digest: str
    size: int

    def to_proto(self) -> pb.ArtifactRef:
        """The same reference as a wire message."""
        return pb.ArtifactRef(digest=self.digest, size=self.size)

    @classmethod
    def from_proto(cls, message: pb.ArtifactRef) -> Self:
        """Reads a wire message; raises AdapterError for a digest that is none."""
        if len(message.digest) != 64 or set(message.digest) - set("0123456789abcdef"):
            raise AdapterError("artifact digest is not 64 lower-case hexadecimal digits")
        return cls(message.digest, message.size)

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Hashes a file."""
        with path.open("rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name and shape of one tensor, named as PEFT saves it."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank_axis(self) -> int:
        """The axis that counts LoRA's rank: rows of A (rank, in), columns of B (out, rank)."""
        return 0 if self.name.endswith(".lora_A.weight") else 1

    @property
    def scales(self) -> TensorSpec:
        """The scales that go with the tensor where it is quantised, one per rank."""
        return TensorSpec(f"{self.name}.scales", (self.shape[self.rank_axis],))


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """All tensors of a run's adapter, sorted by name, and the modules that carry it."""

    tensors: tuple[TensorSpec, ...]
    target_modules: tuple[str, ...]

    def to_proto(self) -> pb.AdapterManifest:
        """The same manifest as a wire message."""
        return pb.AdapterManifest(
            tensors=[pb.TensorSpec(name=tensor.name, shape=tensor.shape) for tensor in self.tensors],
            target_modules=self.target_modules,
        )

    @classmethod
    def from_proto(cls, message: pb.AdapterManifest) -> Self:
        """Reads a wire message; raises AdapterError for a manifest that describes no LoRA adapter."""
        tensors = tuple(TensorSpec(tensor.name, tuple(tensor.shape)) for tensor in message.tensors)
        names = [tensor.name for tensor in tensors]
        if not names or names != sorted(set(names)):
            raise AdapterError("the manifest must name at least one tensor, each once, sorted by name")
        for tensor in tensors:
            if len(tensor.name) > _LONGEST_NAME or not tensor.name.isprintable():
                raise AdapterError("the manifest names a tensor with more than 500 or unprintable characters")
            if not tensor.name.endswith((".lora_A.weight", ".lora_B.weight")):
                raise AdapterError(f"the manifest names {tensor.name!r}, which is no LoRA factor")
            if len(tensor.shape) != 2 or not all(tensor.shape):
                raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, not a matrix's")
            if math.prod(tensor.shape) > _LARGEST_TENSOR:
                raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, beyond any model's")
        return cls(tensors, tuple(message.target_modules))


def write_adapter(
    path: Path, manifest: AdapterManifest, tensor: Callable[[TensorSpec], FloatArray], dtype: AdapterDtype
) -> Artifact:
    """Writes a safetensors file durably, asking `tensor` for one float32 array after the other.

    The bytes depend on nothing but manifest, values and dtype, so equal adapters have equal digests. The file
    appears under `path` only when it is complete. Raises AdapterError when an array has another shape, StorageError
    when the file cannot be written.
    """
    stored = _SAFETENSORS_NAMES[dtype]
    entries = [(spec, stored) for spec in manifest.tensors]
    return _write_safetensors(path, entries, (_shaped(tensor(spec), spec) for spec in manifest.tensors))


def write_difference(path: Path, manifest: AdapterManifest, difference: Callable[[TensorSpec], FloatArray]) -> Artifact:
    """Writes an update as its difference to the global adapter in int8, one float32 scale per tensor and rank.

    Otherwise like `write_adapter`; raises AdapterError also for values that are not finite.
    """

    def arrays() -> Iterator[npt.NDArray[Any]]:
        for spec in manifest.tensors:
            values = _shaped(difference(spec), spec)
            if not np.isfinite(values).all():
                raise AdapterError(f"{spec.name} holds values that are not finite")
            yield from quantised(values, spec.rank_axis)

    entries = [entry for spec in manifest.tensors for entry in ((spec, "I8"), (spec.scales, "F32"))]
    return _write_safetensors(path, entries, arrays())


def _shaped(values: FloatArray, spec: TensorSpec) -> FloatArray:
    if values.shape != spec.shape:
        raise AdapterError(f"{spec.name} has shape {values.shape}, the manifest says {spec.shape}")
    return values


def _write_safetensors(
    path: Path, entries: Iterable[tuple[TensorSpec, str]], arrays: Iterable[npt.NDArray[Any]]
) -> Artifact:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    types = []
    for spec, stored in entries:
        length = _NUMPY_TYPES[stored].itemsize * int(np.prod(spec.shape))
        header[spec.name] = {
            "dtype": stored,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + length],
        }
        offset += length
        types.append(_NUMPY_TYPES[stored])
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            for part in (struct.pack("<Q", len(encoded)), encoded):
                digest.update(part)
                file.write(part)
            for stored_type, values in zip(types, arrays, strict=True):
                data = values.astype(stored_type, copy=False).tobytes()
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"cannot write the adapter to {path.parent}: {error.strerror or error}; make room there"
        ) from error
    return Artifact(digest.hexdigest(), 8 + len(encoded) + offset)


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
            self._start, self._entries = _checked_header(self._file, manifest, differences)
        except AdapterError:
            self.close()
            raise
        self.is_difference = manifest.tensors[0].scales.name in self._entries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Releases the file."""
        self._file.close()

    def tensor(self, spec: TensorSpec) -> FloatArray:
        """One tensor as float32, a copy; raises AdapterError when it holds a value that is not finite."""
        values = self._stored(spec)
        if self.is_difference:
            scales = self._stored(spec.scales).astype(np.float32, copy=False)
            if not (np.isfinite(scales) & (scales > 0)).all():
                raise AdapterError(f"{spec.name} has scales that are not finite and above 0")
            with np.errstate(over="ignore"):
                values = dequantised(values, scales, spec.rank_axis)
        values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise AdapterError(f"{spec.name} holds values that are not finite")
        return values

    def _stored(self, spec: TensorSpec) -> npt.NDArray[Any]:
        stored, begin, _ = self._entries[spec.name]
        values = np.empty(spec.shape, _NUMPY_TYPES[stored])
        unread, at = memoryview(values.view(np.uint8).reshape(-1).data), self._start + begin
        # In parts: one call reads no more than 2 GiB.
        while count := os.preadv(self._file.fileno(), [unread], at):
            unread, at = unread[count:], at + count
        if unread:
            raise AdapterError(f"{spec.name} ends before its last byte: the file was cut after it was opened")
        return values


def _checked_header(
    file: FileIO, manifest: AdapterManifest, differences: bool
) -> tuple[int, dict[str, tuple[str, int, int]]]:
    """Start of the tensor bytes, and per tensor its stored type and byte range after that start."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise AdapterError("the adapter file is shorter than a safetensors header")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(_LARGEST_HEADER, size - 8):
        raise AdapterError("the adapter file's header is longer than the file or than any adapter needs")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise AdapterError("the adapter file's header is not JSON") from error
    if not isinstance(header, dict):
        raise AdapterError("the adapter file's header is not a JSON object")
    header.pop("__metadata__", None)
    expected = {spec.name: (spec.shape, _FLOATS) for spec in manifest.tensors}
    if differences and manifest.tensors[0].scales.name in header:
        expected = {spec.name: (spec.shape, ("I8",)) for spec in manifest.tensors}
        expected |= {spec.scales.name: (spec.scales.shape, ("F32",)) for spec in manifest.tensors}
    if header.keys() != expected.keys():
        odd = sorted(set(header) ^ set(expected))
        raise AdapterError(f"tensors differ from the run's manifest, {len(odd)} of them; the first is {odd[0][:200]!r}")
    entries: dict[str, tuple[str, int, int]] = {}
    payload = size - 8 - length
    for name, (shape, types) in expected.items():
        entry = header[name]
        match entry:
            case {"dtype": str(stored), "shape": list(found), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise AdapterError(f"the header's entry for {name} is malformed")
        if tuple(found) != shape:
            # What the file says may be anything, of any length: it is shown escaped and abbreviated.
            raise AdapterError(f"{name} has shape {reprlib.repr(tuple(found))}, the run's manifest says {shape}")
        if stored not in types:
            travels = " or ".join(", ".join(types).rsplit(", ", 1))
            raise AdapterError(f"{name} has type {reprlib.repr(stored)}; adapters travel as {travels}")
        if not 0 <= begin <= end <= payload or end - begin != _NUMPY_TYPES[stored].itemsize * int(np.prod(shape)):
            raise AdapterError(f"{name} has byte offsets that do not fit its shape or the file")
        entries[name] = (stored, begin, end)
    return 8 + length, entries


def initial_tensor(spec: TensorSpec, seed: int) -> FloatArray:
    """First value of one LoRA factor: B is zero, A uniform within 1/sqrt(in), as PEFT's Kaiming start.

    Drawn from the run's seed and the tensor's name, so that it depends on neither order nor process.
    """
    if spec.name.endswith(".lora_B.weight"):
        return np.zeros(spec.shape, dtype=np.float32)
    name = int.from_bytes(hashlib.sha256(spec.name.encode()).digest()[:8], "little")
    bound = 1 / np.sqrt(spec.shape[1])
    return np.random.default_rng([seed, name]).uniform(-bound, bound, spec.shape).astype(np.float32)


def peft_config(spec: RunSpec, manifest: AdapterManifest) -> str:
    """PEFT's adapter_config.json for a run's adapter: what PeftModel.from_pretrained needs to load it."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.model,
        "revision": spec.model_revision or None,
        "r": spec.lora_rank,
        "lora_alpha": spec.lora_alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": sorted(manifest.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return json.dumps(config, indent=2, sort_keys=True) + "\n"
