"""The layers that get an adapter: wanted names resolved on a model, so that PEFT matches those and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhds.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from fedhds_client.models.loading import BaseModel


def resolve_targets(
    wanted: tuple[str, ...],
    base: BaseModel,
    *,
    setting: str,
    method: str,
    takes: Callable[[Any], bool] = lambda module: True,
) -> list[str]:
    """Endings of names that only the wanted linear layers of the model have, sorted.

    `setting` has the wanted names, by their last part, or all-linear; `takes` says on which layers the method can be.
    Raises ModelError for a name that the model lacks or whose layers cannot train.
    """
    from fedhds_client.models.probing import linear_layers

    layers = linear_layers(base)
    possible = [name for name in layers.trainable if takes(base.model.get_submodule(name))]
    trainable = _loadable(possible, base.model)
    if wanted == ("all-linear",):
        names = [name for name in layers.default if name in trainable]
    else:
        names = [name for name in trainable if _last(name) in wanted]
    lacking = sorted(set(wanted) - {_last(name) for name in names} - {"all-linear"})
    if lacking or not names:
        model, setting = base.name, f"{setting}, which the operator of the coordinator sets,"
        there = ", ".join(sorted({_last(name) for name in trainable}))
        if not there:
            raise ModelError(
                f"{method} can train no linear layer of {model}; the operator of the coordinator sets --model and "
                "--peft-method"
            )
        if not lacking:
            raise ModelError(f"{setting} is all-linear, and {model} has only routers and experts; name some of {there}")
        present = lacking[0] in {_last(name) for name in (*layers.trainable, *layers.others)}
        fault = "on which an adapter would not train in this model" if present else "which this model does not have"
        raise ModelError(f"{setting} names {lacking[0]!r}, {fault}; it has {there}")
    return _endings(names, [name for name, _ in base.model.named_modules()])


def _loadable(names: Collection[str], model: Any) -> list[str]:
    """Those on which PEFT puts an adapter, and finds it again in a file; tried with LoRA, which other methods follow.

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
