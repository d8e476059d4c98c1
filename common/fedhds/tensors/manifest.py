"""The manifest of a run's adapter: its tensors, their first values, and the configuration that PEFT loads it by."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from fedhds.errors import AdapterError
from fedhds.fingerprint import is_digest
from fedhds.v2 import federation_pb2 as pb

FloatArray = npt.NDArray[np.float32]

# Ten times those of a model with 400 billion parameters.
MAX_TENSORS = 1 << 14
# Names stand in logs and journals.
MAX_NAME_LENGTH = 500
# The highest LoRA rank, 1024, times a million features, which no known model has.
MAX_TENSOR_VALUES = 1 << 30
# Beyond any adapter's; NumPy itself ends at 32 or 64.
MAX_DIMENSIONS = 8
# First values are drawn in doubles: so many at once take 8 MiB.
_BLOCK = 1 << 20
# Far above any useful start, and float16 holds it.
MAX_BOUND = 1000.0
MAX_CONFIG_BYTES = 64 << 10
MAX_STOP_TOKENS = 16
MAX_STOP_TEXT = 100
# The header of a safetensors file keeps this name for itself.
_RESERVED_NAME = "__metadata__"
# The key of adapter_config.json in which sites may differ.
_VERSION_KEY = "peft_version"


class InitialKind(StrEnum):
    """How a first value is made."""

    ZEROS = "zeros"
    ONES = "ones"
    UNIFORM = "uniform"
    BASE = "base"
    """What the tensor is on the base model alone; sites compute it, the coordinator takes it from one."""


_TO_PROTO = {
    InitialKind.ZEROS: pb.INITIAL_KIND_ZEROS,
    InitialKind.ONES: pb.INITIAL_KIND_ONES,
    InitialKind.UNIFORM: pb.INITIAL_KIND_UNIFORM,
    InitialKind.BASE: pb.INITIAL_KIND_BASE,
}
_FROM_PROTO: dict[int, InitialKind] = {number: kind for kind, number in _TO_PROTO.items()}


@dataclass(frozen=True, slots=True)
class Initial:
    """How a tensor's first value is made.

    `bound` is the largest absolute value of a uniform one, else 0; `digest` of one from the base model `values_digest`.
    """

    kind: InitialKind
    bound: float = 0.0
    digest: str = ""

    @classmethod
    def zeros(cls) -> Self:
        """All values are 0."""
        return cls(InitialKind.ZEROS)

    @classmethod
    def ones(cls) -> Self:
        """All values are 1."""
        return cls(InitialKind.ONES)

    @classmethod
    def uniform(cls, bound: float) -> Self:
        """Values are uniform within `bound` of 0."""
        return cls(InitialKind.UNIFORM, bound)

    @classmethod
    def base(cls, values: FloatArray) -> Self:
        """The values, which follow from the base model."""
        return cls(InitialKind.BASE, digest=values_digest(values))


def values_digest(values: FloatArray) -> str:
    """SHA-256 of float32 values, little-endian, in C order."""
    return hashlib.sha256(np.ascontiguousarray(values, dtype="<f4").tobytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor, named as PEFT saves it.

    `role` says what it is to its PEFT method, such as `lora_A`, `magnitude` or `bias`. `scale_axis` is the axis along
    which int8 keeps one scale per index; None: one scale for the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    initial: Initial
    scale_axis: int | None

    @property
    def scales_name(self) -> str:
        """The name under which the scales of an int8 difference are stored."""
        return f"{self.name}.scales"

    @property
    def scales_shape(self) -> tuple[int]:
        """The shape of these scales."""
        return (1 if self.scale_axis is None else self.shape[self.scale_axis],)

    def initial_value(self, seed: int) -> FloatArray:
        """The first value, float32 of `shape`; a uniform one depends on `seed` and the name, not on order or process.

        With the bound 1/sqrt(in) it is PEFT's Kaiming start of LoRA's A. Raises ValueError for one from the base model.
        """
        match self.initial.kind:
            case InitialKind.ZEROS:
                return np.zeros(self.shape, dtype=np.float32)
            case InitialKind.ONES:
                return np.ones(self.shape, dtype=np.float32)
            case InitialKind.UNIFORM:
                name = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")
                generator = np.random.default_rng([seed, name])
                values = np.empty(math.prod(self.shape), dtype=np.float32)
                for start in range(0, len(values), _BLOCK):
                    block = values[start : start + _BLOCK]
                    block[:] = generator.uniform(-self.initial.bound, self.initial.bound, len(block))
                return values.reshape(self.shape)
            case InitialKind.BASE:
                raise ValueError(f"the first value of {self.name} follows from the base model")

    def to_proto(self) -> pb.TensorSpec:
        """The same tensor as a wire message."""
        return pb.TensorSpec(
            name=self.name,
            shape=self.shape,
            role=self.role,
            initial=_TO_PROTO[self.initial.kind],
            bound=self.initial.bound,
            scale_axis=self.scale_axis,
            digest=self.initial.digest,
        )

    @classmethod
    def from_proto(cls, message: pb.TensorSpec) -> Self:
        """Reads a wire message; raises AdapterError, naming the tensor, for one that no adapter has."""
        name, shape = message.name, tuple(message.shape)
        if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
            raise AdapterError("the manifest names a tensor with no, more than 500 or unprintable characters")
        if name == _RESERVED_NAME:
            raise AdapterError(f"the manifest names a tensor {name!r}, which a safetensors file cannot hold")
        if not 0 < len(shape) <= MAX_DIMENSIONS or not all(shape):
            raise AdapterError(f"the manifest gives {name!r} the shape {shape[: MAX_DIMENSIONS + 1]}, not a tensor's")
        if math.prod(shape) > MAX_TENSOR_VALUES:
            raise AdapterError(f"the manifest gives {name!r} the shape {shape}, beyond any model's")
        if not re.fullmatch("[A-Za-z0-9_]{1,32}", message.role):
            raise AdapterError(f"the manifest gives {name!r} a role that is not 1 to 32 letters, digits or underscores")
        kind = _FROM_PROTO.get(message.initial)
        if kind is None:
            raise AdapterError(f"the manifest does not say how the first value of {name!r} is made")
        # Written so that NaN is refused, too.
        uniform = kind is InitialKind.UNIFORM
        if not (0 < message.bound <= MAX_BOUND if uniform else message.bound == 0):
            needed = f"above 0 and at most {MAX_BOUND:g}" if uniform else "0"
            raise AdapterError(f"the manifest gives {name!r}, {kind} at first, the bound {message.bound}, not {needed}")
        if not (is_digest(message.digest) if kind is InitialKind.BASE else not message.digest):
            needed = "one of 64 hexadecimal digits" if kind is InitialKind.BASE else "none"
            raise AdapterError(
                f"the manifest gives {name!r}, {kind} at first, the digest {message.digest[:70]!r}, not {needed}"
            )
        axis = message.scale_axis if message.HasField("scale_axis") else None
        if axis is not None and axis >= len(shape):
            raise AdapterError(f"the manifest gives {name!r} scales along axis {axis}, which its shape {shape} lacks")
        return cls(name, shape, message.role, Initial(kind, message.bound, message.digest), axis)


@dataclass(frozen=True, slots=True)
class StopToken:
    """A token at which generation stops; `text` is how people read it, empty when they cannot."""

    id: int
    text: str

    @classmethod
    def of(cls, token: int, text: str) -> Self:
        """With the text if it has a form that a model card can show."""
        return cls(token, text if _showable(text) else "")

    @classmethod
    def from_proto(cls, message: pb.StopToken) -> Self:
        """Reads a wire message; raises AdapterError for a text that is not fit to be shown."""
        if not _showable(message.text):
            raise AdapterError(f"the manifest gives stop token {message.id} a text that a model card cannot show")
        return cls(message.id, message.text)


def _showable(text: str) -> bool:
    return len(text) <= MAX_STOP_TEXT and text.isprintable() and "`" not in text


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """All tensors of a run's adapter, sorted by name, the text of its adapter_config.json, and what ends an answer."""

    tensors: tuple[TensorSpec, ...]
    config: str
    stop_tokens: tuple[StopToken, ...] = ()

    @property
    def generation_config(self) -> str:
        """generation_config.json as transformers reads it; empty when it is not known what ends an answer."""
        if not self.stop_tokens:
            return ""
        return json.dumps({"eos_token_id": [token.id for token in self.stop_tokens]}, indent=2) + "\n"

    @property
    def size(self) -> int:
        """Bytes of all values in float32."""
        return 4 * sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def roles(self) -> frozenset[str]:
        """What the tensors are to their PEFT method."""
        return frozenset(tensor.role for tensor in self.tensors)

    def only(self, roles: frozenset[str]) -> AdapterManifest:
        """The tensors with these roles alone, as the updates of a round have them in which the others do not train."""
        return replace(self, tensors=tuple(tensor for tensor in self.tensors if tensor.role in roles))

    @property
    def from_base(self) -> AdapterManifest:
        """The tensors alone whose first values follow from the base model."""
        return replace(self, tensors=tuple(t for t in self.tensors if t.initial.kind is InitialKind.BASE))

    def parsed_config(self) -> dict[str, Any]:
        """The configuration as JSON; raises AdapterError when it is not an object."""
        try:
            config = json.loads(self.config)
        except (ValueError, RecursionError) as error:
            raise AdapterError("the adapter's configuration is not JSON") from error
        if not isinstance(config, dict):
            raise AdapterError("the adapter's configuration is not a JSON object")
        return config

    def agrees_with(self, other: AdapterManifest) -> bool:
        """Whether tensors and stop tokens are equal, and configurations are, as JSON and apart from `peft_version`.

        A run of an earlier version knows no stop tokens.
        """
        ours, theirs = ({**manifest.parsed_config(), _VERSION_KEY: None} for manifest in (self, other))
        stops = not self.stop_tokens or not other.stop_tokens or self.stop_tokens == other.stop_tokens
        return stops and (self.tensors, ours) == (other.tensors, theirs)

    def to_proto(self) -> pb.AdapterManifest:
        """The same manifest as a wire message."""
        return pb.AdapterManifest(
            tensors=[tensor.to_proto() for tensor in self.tensors],
            config=self.config,
            stop_tokens=[pb.StopToken(id=token.id, text=token.text) for token in self.stop_tokens],
        )

    @classmethod
    def from_proto(cls, message: pb.AdapterManifest) -> Self:
        """Reads a wire message; raises AdapterError for a manifest that describes no adapter."""
        if len(message.tensors) > MAX_TENSORS:
            raise AdapterError(f"the manifest names {len(message.tensors)} tensors, more than {MAX_TENSORS}")
        names = [tensor.name for tensor in message.tensors]
        if not names or names != sorted(set(names)):
            raise AdapterError("the manifest must name at least one tensor, each once, sorted by name")
        if len(message.stop_tokens) > MAX_STOP_TOKENS:
            raise AdapterError(
                f"the manifest names {len(message.stop_tokens)} stop tokens, more than {MAX_STOP_TOKENS}"
            )
        stops = tuple(StopToken.from_proto(token) for token in message.stop_tokens)
        manifest = cls(tuple(TensorSpec.from_proto(tensor) for tensor in message.tensors), message.config, stops)
        if taken := {tensor.scales_name for tensor in manifest.tensors} & set(names):
            raise AdapterError(f"the manifest names a tensor {min(taken)!r}, the name of another tensor's scales")
        if len(manifest.config.encode()) > MAX_CONFIG_BYTES:
            raise AdapterError(f"the adapter's configuration is longer than {MAX_CONFIG_BYTES >> 10} KiB")
        manifest.parsed_config()
        return manifest
