"""The interface of PEFT methods' parameters, and checks of manifests that they share."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from fedhds.errors import AdapterError
from fedhds.settings import Parameters, parameter

if TYPE_CHECKING:
    from pathlib import Path

    from fedhds.tensors.manifest import AdapterManifest, InitialKind, TensorSpec

# Twice the largest vocabulary, and far more features than any linear layer has.
MAX_FEATURES = 1 << 20
# No model has more kinds of linear layers.
MAX_TARGETS = 256


class PeftSpec(Parameters):
    """Base of the methods' parameters."""

    summary: ClassVar[str]
    """What the method does, in a few words."""

    method: str = parameter(..., "What is trained in place of the base model's own weights.", setting="peft_method")

    @property
    def peft_type(self) -> str:
        """What PEFT calls the method in adapter_config.json."""
        return self.method.upper().replace("-", "_")

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the adapter's tensors, for aggregators that need certain ones; empty: not known beforehand."""
        return frozenset()

    @property
    def stated(self) -> dict[str, Any]:
        """Keys of adapter_config.json with the value that the run's settings give them."""
        return {}

    @property
    def dp_sgd_obstacle(self) -> str:
        """Why DP-SGD cannot train the method's parameters, as Opacus takes gradients per row; empty when it can."""
        return f"{self.method} trains other parameters than linear layers' weights; choose lora"

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Raises AdapterError, naming the tensor, for a manifest that the method does not give on any model.

        A method that does not override it takes any tensors; `--max-adapter-size` bounds them in any case.
        """

    def peft_file(self, adapter: Path, manifest: AdapterManifest, scratch: Path) -> Path:
        """The file as PEFT saves it that belongs to an adapter of the run: `adapter` itself, or `scratch`, now written.

        Raises AdapterError when `adapter` is not one of `manifest`, StorageError when the file cannot be written.
        """
        return adapter


def split_names(names: Any) -> Any:
    """Takes names divided by commas, too, as in the environment: no module's name has one."""
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return names
    return tuple(name for text in names for name in re.split(r"[,\s]+", text) if name)


def check_names(names: tuple[str, ...], whole: str) -> tuple[str, ...]:
    """Checks names of modules by their last part, or `whole` alone; raises ValueError."""
    if whole in names and len(names) > 1:
        raise ValueError(f"{whole} stands alone; give it, or names of modules")
    for name in names:
        if "." in name:
            raise ValueError(f"give the last part of the module's name: {name.rpartition('.')[2]}, not {name}")
    return names


def check_tensor(
    tensor: TensorSpec, *, role: str, initial: InitialKind, bound: float = 0.0, scale_axis: int | None
) -> None:
    """Raises AdapterError for another role, first value or axis of int8's scales."""
    if tensor.role != role:
        raise AdapterError(f"the manifest gives {tensor.name!r} the role {tensor.role}, not {role}")
    # Written so that NaN is refused, too.
    if tensor.initial.kind != initial or not abs(tensor.initial.bound - bound) <= 1e-6 * bound:
        raise AdapterError(f"the manifest gives {tensor.name!r} another first value than the run's PEFT method")
    if tensor.scale_axis != scale_axis:
        raise AdapterError(f"the manifest gives {tensor.name!r} other int8 scales than the run's PEFT method")
