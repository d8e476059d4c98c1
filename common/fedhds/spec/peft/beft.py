"""BEFT: biases alone, as in BitFit (Zaken et al. 2022), but added to the layers (arXiv 2509.15974)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from fedhds.errors import AdapterError
from fedhds.settings import parameter
from fedhds.spec.peft.base import MAX_FEATURES, MAX_TARGETS, PeftSpec, check_names, check_tensor, split_names

if TYPE_CHECKING:
    from fedhds.tensors.manifest import AdapterManifest


class BeftSpec(PeftSpec):
    """A trained bias on top of each layer's own, if it has one."""

    summary = "biases of linear layers alone (BitFit), also where the model has none"

    method: Literal["beft"] = "beft"
    targets: tuple[str, ...] = parameter(
        ("all-linear",),
        "Modules that get a trained bias, by the last part of their name, or all-linear.",
        setting="beft_targets",
        min_length=1,
        max_length=MAX_TARGETS,
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        return split_names(names)

    @field_validator("targets")
    @classmethod
    def _check(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(targets, "all-linear")

    @property
    def roles(self) -> frozenset[str]:
        """The biases."""
        return frozenset({"beft_bias"})

    @property
    def stated(self) -> dict[str, Any]:
        """That biases start as zeros."""
        return {"init_weights": True}

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Tensors are biases (1, out), zeros at first."""
        from fedhds.tensors.manifest import InitialKind

        for tensor in manifest.tensors:
            vector = len(tensor.shape) == 2 and tensor.shape[0] == 1 and tensor.shape[1] <= MAX_FEATURES
            if not vector or not tensor.name.endswith(".beft_bias"):
                raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, which is no bias")
            check_tensor(tensor, role="beft_bias", initial=InitialKind.ZEROS, scale_axis=None)
