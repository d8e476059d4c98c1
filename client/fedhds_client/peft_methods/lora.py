"""LoRA: low-rank factors beside linear layers (Hu et al. 2021)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fedhds.errors import ModelError
from fedhds.spec import LoraSpec
from fedhds.tensors.manifest import Initial
from fedhds_client.peft_methods.base import PeftMethod

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from peft import LoraConfig

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel

# The axis that counts the rank: rows of A (rank, in), columns of B (out, rank).
_RANK_AXIS = {"lora_A": 0, "lora_B": 1}


class Lora(PeftMethod):
    """B starts at zero, so that a new adapter changes nothing; A is uniform within 1/sqrt(in), PEFT's Kaiming start."""

    def config(self, spec: RunSpec, base: BaseModel) -> LoraConfig:
        """LoRA on the run's target modules; raises ModelError for a target that the model lacks or cannot train."""
        from peft import LoraConfig

        lora = spec.peft
        assert isinstance(lora, LoraSpec)
        return LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT scales by any number
            lora_dropout=lora.dropout,
            target_modules=_targets(lora.targets, base),
            task_type="CAUSAL_LM",
            bias="none",
        )

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Uniform for A, zeros for B."""
        return Initial.uniform(1 / math.sqrt(shape[1])) if role == "lora_A" else Initial.zeros()

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """One scale per rank."""
        return _RANK_AXIS[role]


def _targets(wanted: tuple[str, ...], base: BaseModel) -> list[str]:
    """Endings of names that only the wanted linear layers of the model have, sorted."""
    from fedhds_client.models.probing import linear_layers

    layers = linear_layers(base)
    trainable = _loadable(layers.trainable, base.model)
    if wanted == ("all-linear",):
        names = [name for name in layers.default if name in trainable]
    else:
        names = [name for name in trainable if _last(name) in wanted]
    lacking = sorted(set(wanted) - {_last(name) for name in names} - {"all-linear"})
    if lacking or not names:
        model, setting = base.name, "--lora-targets, which the operator of the coordinator sets,"
        there = ", ".join(sorted({_last(name) for name in trainable}))
        if not there:
            raise ModelError(f"LoRA can train no linear layer of {model}; the operator of the coordinator sets --model")
        if not lacking:
            raise ModelError(f"{setting} is all-linear, and {model} has only routers and experts; name some of {there}")
        present = lacking[0] in {_last(name) for name in (*layers.trainable, *layers.others)}
        fault = "on which an adapter would not train in this model" if present else "which this model does not have"
        raise ModelError(f"{setting} names {lacking[0]!r}, {fault}; it has {there}")
    return _endings(names, [name for name, _ in base.model.named_modules()])


def _loadable(names: Collection[str], model: Any) -> list[str]:
    """Those on which PEFT puts an adapter, and finds it again in a file.

    In some mixtures of experts it takes names of dense layers for those that experts had in transformers 4, or renames
    them in a file as it would rename the weights of a checkpoint.
    """
    import torch
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )

    def is_kept(target: str) -> bool:
        config = LoraConfig(target_modules=[target])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:
            # Half of a pair that was fused.
            return False
        return bool(config.target_modules)

    kept = {target for target in {_last(name) for name in names} if is_kept(target)}
    saved = {name: f"base_model.model.{name}.lora_A.weight" for name in names if _last(name) in kept}
    state = {key: torch.zeros(1, 1) for key in saved.values()}
    config = LoraConfig(target_modules=list(saved))
    loaded = convert_peft_adapter_state_dict_for_transformers(model, config, state)
    return [name for name, key in saved.items() if key in loaded]


def _endings(names: Iterable[str], modules: Collection[str]) -> list[str]:
    """The shortest ending of each name that no other module's name has, as PEFT matches targets."""
    names = set(names)
    taken = {ending for module in modules if module not in names for ending in _endings_of(module)}
    return sorted({next((ending for ending in _endings_of(name) if ending not in taken), name) for name in names})


def _endings_of(name: str) -> list[str]:
    """From the last part to the whole name."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
