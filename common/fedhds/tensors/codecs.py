"""The wire types of updates: what a site writes, and in which type the global adapter is kept under each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterDtype, file_sizes, write_adapter, write_difference


@dataclass(frozen=True, slots=True)
class Codec:
    """One wire type.

    `adapter_dtype` is the type of the global adapter under it. With `is_difference` an update holds the difference to
    that adapter, and the site adds what was rounded away to its next one; else it holds the site's adapter itself.
    """

    name: str
    adapter_dtype: AdapterDtype
    is_difference: bool = False

    def write(self, path: Path, manifest: AdapterManifest, tensor: Callable[[TensorSpec], FloatArray]) -> Artifact:
        """Writes an update durably, asking `tensor` for one float32 array after the other.

        Raises AdapterError when an array has another shape, StorageError when the file cannot be written.
        """
        if self.is_difference:
            return write_difference(path, manifest, tensor)
        return write_adapter(path, manifest, tensor, self.adapter_dtype)

    def sizes(self, manifest: AdapterManifest) -> range:
        """Sizes in bytes that the file of an update may have."""
        return file_sizes(manifest, None if self.is_difference else self.adapter_dtype)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("float32", "float32"),
        Codec("bfloat16", "bfloat16"),
        Codec("float16", "float16"),
        # Nobody would make up for what rounding takes from the global adapter itself in every round.
        Codec("int8", "float32", is_difference=True),
    )
}
