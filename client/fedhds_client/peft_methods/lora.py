"""LoRA: low-rank factors beside linear layers (Hu et al. 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedhds.errors import ModelError
from fedhds.spec import LoraSpec
from fedhds.tensors.manifest import Initial
from fedhds_client.peft_methods.base import PeftMethod

if TYPE_CHECKING:
    from peft import LoraConfig

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel

# The axis that counts the rank: rows of A (rank, in), columns of B (out, rank).
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}


class Lora(PeftMethod):
    """B starts at zero, so that a new adapter changes nothing; A is uniform within 1/sqrt(in), PEFT's Kaiming start."""

    def config(self, spec: RunSpec, base: BaseModel) -> LoraConfig:
        """LoRA on the run's target modules; raises ModelError for a target that the model lacks."""
        import torch
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        lora = spec.peft
        assert isinstance(lora, LoraSpec)
        head = base.model.get_output_embeddings()
        linear = {
            name.rsplit(".", 1)[-1]
            for name, module in base.model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
        targets = sorted(linear) if lora.targets == ("all-linear",) else sorted(set(lora.targets))
        unknown = [target for target in targets if target not in linear]
        if unknown:
            raise ModelError(
                f"the model has no linear module {unknown[0]!r}, it has {', '.join(sorted(linear))}; --lora-targets is "
                "set by the operator of the coordinator"
            )
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            bias="none",
        )

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Uniform for A, zeros for B."""
        return Initial.uniform(1 / math.sqrt(shape[1])) if role == "lora_A" else Initial.zeros()

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """One scale per rank."""
        return _RANK_AXIS[role]
