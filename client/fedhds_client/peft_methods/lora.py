"""LoRA: low-rank factors beside linear layers, with the lengths of the weights' rows in DoRA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhds.errors import ModelError
from fedhds.spec import LoraSpec
from fedhds.spec.peft.lora import MAGNITUDE
from fedhds.tensors.manifest import FloatArray, Initial
from fedhds_client.peft_methods.base import PeftMethod, adapter_state
from fedhds_client.peft_methods.targets import resolve_targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from peft import LoraConfig

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel

# Values of a weight that are in memory as doubles at once: 32 MiB.
_BLOCK = 1 << 22
# The axis that counts the rank: rows of A (rank, in), columns of B (out, rank).
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}


class Lora(PeftMethod):
    """B starts at zero, so that a new adapter changes nothing; A is uniform within 1/sqrt(in), PEFT's Kaiming start."""

    def config(self, spec: RunSpec, base: BaseModel) -> LoraConfig:
        """LoRA on the run's target modules; raises ModelError for a target that the model lacks or cannot train."""
        from peft import LoraConfig

        lora = spec.peft
        assert isinstance(lora, LoraSpec)
        if lora.use_dora and getattr(base.model, "hf_quantizer", None) is not None:
            raise ModelError(
                f"DoRA starts from the lengths of the weights, and those of {base.name} are quantized here, so that "
                "other sites have other ones; load it in another --dtype, or the operator of the coordinator drops "
                "--use-dora"
            )
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=lora.dropout,
            target_modules=resolve_targets(lora.targets, base, setting="--lora-targets", method="LoRA"),
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            task_type="CAUSAL_LM",
            bias="none",
        )

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Uniform for A, zeros for B."""
        return Initial.uniform(1 / math.sqrt(shape[1])) if role == "lora_A" else Initial.zeros()

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """One scale per rank; one for DoRA's lengths of a layer."""
        return _RANK_AXIS.get(role)

    def base_values(self, module: Any) -> Mapping[str, FloatArray]:
        """DoRA's lengths."""
        return {
            name: row_lengths(_weight(module.get_submodule(name.removesuffix(f".{MAGNITUDE}"))))
            for name in adapter_state(module)
            if name.endswith(f".{MAGNITUDE}")
        }


def _weight(layer: Any) -> torch.Tensor:
    """The base model's weights in a layer, (out, in)."""
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import transpose

    weight: torch.Tensor = transpose(dequantize_module_weight(layer.get_base_layer()), layer.fan_in_fan_out)
    return weight.detach()


def row_lengths(weight: torch.Tensor) -> FloatArray:
    """L2 norms of the rows of a weight (out, in), float32 (out,); the same bits on every machine.

    Of the weights in bfloat16, as one site may have loaded them and another not; added up in a fixed order.
    """
    import torch

    rows, width = weight.shape
    lengths = np.empty(rows, dtype=np.float32)
    step = max(1, _BLOCK // width)
    for start in range(0, rows, step):
        values = weight[start : start + step].to(torch.bfloat16).double().cpu().numpy()
        squares = np.square(values)
        while squares.shape[1] > 1:
            half = (squares.shape[1] + 1) // 2
            sums = squares[:, :half].copy()
            sums[:, : squares.shape[1] - half] += squares[:, half:]
            squares = sums
        lengths[start : start + step] = np.sqrt(squares[:, 0])
    return lengths
