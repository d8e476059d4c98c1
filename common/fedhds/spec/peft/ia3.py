"""(IA)3: vectors that scale activations (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import field_validator, model_validator

from fedhds.errors import AdapterError
from fedhds.settings import parameter
from fedhds.spec.peft.base import MAX_FEATURES, MAX_TARGETS, PeftSpec, check_names, check_tensor, split_names

if TYPE_CHECKING:
    from fedhds.tensors.manifest import AdapterManifest


class Ia3Spec(PeftSpec):
    """(IA)3: one vector for each module."""

    summary = "vectors that scale keys, values and the feed-forward layers' activations"

    method: Literal["ia3"] = "ia3"
    targets: tuple[str, ...] = parameter(
        ("auto",),
        "Modules that get a vector, by the last part of their name; auto: those that PEFT names for the architecture.",
        setting="ia3_targets",
        min_length=1,
        max_length=MAX_TARGETS,
    )
    feedforward: tuple[str, ...] = parameter(
        (),
        "Those of --ia3-targets whose inputs are scaled, not their outputs.",
        setting="ia3_feedforward",
        max_length=MAX_TARGETS,
    )

    @field_validator("targets", "feedforward", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        return split_names(names)

    @field_validator("targets")
    @classmethod
    def _check(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(targets, "auto")

    @model_validator(mode="after")
    def _check_feedforward(self) -> Self:
        if lacking := sorted(set(self.feedforward) - set(self.targets)):
            raise ValueError(f"ia3_feedforward: {lacking[0]} is not among --ia3-targets; name it there, too")
        return self

    @property
    def roles(self) -> frozenset[str]:
        """The vectors."""
        return frozenset({"ia3_l"})

    @property
    def stated(self) -> dict[str, Any]:
        """That vectors start as ones."""
        return {"init_ia3_weights": True}

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Tensors are vectors, (1, in) or (out, 1), of ones at first."""
        from fedhds.tensors.manifest import InitialKind

        for tensor in manifest.tensors:
            vector = len(tensor.shape) == 2 and 1 in tensor.shape and max(tensor.shape) <= MAX_FEATURES
            if not vector or not tensor.name.endswith(".ia3_l"):
                raise AdapterError(
                    f"the manifest gives {tensor.name!r} the shape {tensor.shape}, which is no vector of (IA)3"
                )
            check_tensor(tensor, role="ia3_l", initial=InitialKind.ONES, scale_axis=None)
