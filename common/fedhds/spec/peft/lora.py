"""LoRA (Hu et al. 2021, arXiv 2106.09685), with rsLoRA's scale (Kalajdzievski 2023) and DoRA (Liu et al. 2024)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import field_validator

from fedhds.errors import AdapterError
from fedhds.settings import parameter
from fedhds.spec.peft.base import MAX_FEATURES, MAX_TARGETS, PeftSpec, check_names, check_tensor, split_names

if TYPE_CHECKING:
    from fedhds.tensors.manifest import AdapterManifest, TensorSpec

# What LoRA's factors are to it.
LORA_ROLES: Final = frozenset({"lora_A", "lora_B"})
# What DoRA has besides: lengths of the rows of the layer's weights.
MAGNITUDE: Final = "lora_magnitude_vector"


class LoraSpec(PeftSpec):
    """Low-rank adapters (Hu et al. 2021)."""

    summary = "low-rank adapters beside linear layers"

    method: Literal["lora"] = "lora"
    rank: int = parameter(8, "LoRA rank.", setting="lora_rank", ge=1, le=1024)
    alpha: float = parameter(16.0, "LoRA scale numerator (the scale is alpha / rank).", setting="lora_alpha", gt=0)
    dropout: float = parameter(0.05, "Dropout on the adapter's input.", setting="lora_dropout", ge=0, lt=1)
    targets: tuple[str, ...] = parameter(
        ("all-linear",),
        "Modules that get an adapter, by the last part of their name, or all-linear.",
        setting="lora_targets",
        min_length=1,
        max_length=MAX_TARGETS,
    )

    use_rslora: bool = parameter(
        False,
        "Scale by alpha / sqrt(rank), so that a higher rank does not learn more slowly (rsLoRA).",
        setting="use_rslora",
    )
    use_dora: bool = parameter(
        False,
        "Train the lengths of the weights' rows beside the factors, too (DoRA); vLLM and llama.cpp do not load it.",
        setting="use_dora",
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
        """The two factors, and DoRA's lengths."""
        return LORA_ROLES | {MAGNITUDE} if self.use_dora else LORA_ROLES

    @property
    def stated(self) -> dict[str, Any]:
        """Rank, scale and dropout, rsLoRA and DoRA."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
        }

    @property
    def dp_sgd_obstacle(self) -> str:
        """DoRA's lengths are no linear layer's weights."""
        return "DoRA's lengths are no linear layer's weights; drop --use-dora" if self.use_dora else ""

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """Tensors are pairs of A (rank, in), uniform within 1/sqrt(in) at first, and B (out, rank), zeros at first.

        With DoRA each pair has lengths (out), at first those of the base model's weights.
        """
        shapes = {tensor.name: tensor.shape for tensor in manifest.tensors}
        for tensor in manifest.tensors:
            if self.use_dora and tensor.name.endswith(f".{MAGNITUDE}"):
                _check_magnitude(tensor, shapes)
                continue
            first = tensor.role == "lora_A"
            own, other = (".lora_A.", ".lora_B.") if first else (".lora_B.", ".lora_A.")
            rank_axis = 0 if first else 1
            if tensor.role not in ("lora_A", "lora_B") or own not in tensor.name:
                raise AdapterError(f"the manifest names {tensor.name!r}, which is no factor of a LoRA adapter")
            if tensor.name.replace(own, other) not in shapes:
                raise AdapterError(f"the manifest names {tensor.name!r} without the other factor of its pair")
            if self.use_dora and f"{tensor.name.rpartition(own)[0]}.{MAGNITUDE}" not in shapes:
                raise AdapterError(f"the manifest names {tensor.name!r} without DoRA's lengths")
            if len(tensor.shape) != 2 or tensor.shape[rank_axis] != self.rank:
                shape = f"({self.rank}, in)" if first else f"(out, {self.rank})"
                raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, not {shape}")
            features = tensor.shape[1 - rank_axis]
            if features > MAX_FEATURES:
                raise AdapterError(f"the manifest gives {tensor.name!r} {features} features, beyond {MAX_FEATURES}")
            bound = 1 / math.sqrt(features) if first else 0.0
            if tensor.initial.kind != ("uniform" if first else "zeros") or not math.isclose(
                tensor.initial.bound, bound, rel_tol=1e-6
            ):
                raise AdapterError(f"the manifest gives {tensor.name!r} another first value than LoRA's")
            if tensor.scale_axis != rank_axis:
                raise AdapterError(f"the manifest does not give {tensor.name!r} one scale per rank")


def _check_magnitude(tensor: TensorSpec, shapes: dict[str, tuple[int, ...]]) -> None:
    from fedhds.tensors.manifest import InitialKind

    factor = shapes.get(f"{tensor.name.removesuffix(MAGNITUDE)}lora_B.weight", ())
    if tensor.shape != factor[:1]:
        raise AdapterError(f"the manifest gives {tensor.name!r} the shape {tensor.shape}, not that of its layer")
    check_tensor(tensor, role=MAGNITUDE, initial=InitialKind.BASE, scale_axis=None)
