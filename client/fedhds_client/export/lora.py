"""A LoRA adapter's factors, and what of its configuration is more than factors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhds.errors import UsageError
from fedhds_client.export.adapter_folder import TENSORS, AdapterFolder

_PREFIX = "base_model.model."
# Keys of adapter_config.json that, when set, make a module compute something else than W x + scale * B A x. What
# starts an adapter (PiSSA and the like) changes the base model, too.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "replicated layers",
    "lora_bias": "biases of factors",
    "target_parameters": "factors of parameters that are no linear layer",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Factors:
    """One module's pair: the module computes W x + scale * B A x."""

    module: str
    """The module's name in the base model."""
    a: NDArray[np.float32]
    """(rank, in)."""
    b: NDArray[np.float32]
    """(out, rank)."""
    scale: float


def variants_of(config: dict[str, Any]) -> list[str]:
    """What makes the adapter more than plain factors, in people's words; empty for LoRA and rsLoRA."""
    names = [name for key, name in VARIANTS.items() if config.get(key)]
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGES_BASE):
        names.append(f"{start}'s change of the base model")
    return names


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies B A with in a module."""
    alpha = config.get("lora_alpha", 8)
    if pattern := config.get("alpha_pattern"):
        from peft.utils.other import get_pattern_key

        alpha = pattern.get(get_pattern_key(pattern.keys(), module), alpha)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def tensor_names(adapter: AdapterFolder) -> list[str]:
    """Names of the adapter's tensors; raises UsageError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter.path / TENSORS, "numpy") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"--adapter: {adapter.path / TENSORS} is damaged ({error}); copy it again") from error


def modules_of(names: list[str]) -> tuple[list[str], list[str]]:
    """The modules that have both factors, by name; and the tensors that are no factor of one."""
    firsts = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
    seconds = {name.removesuffix(".lora_B.weight") for name in names if name.endswith(".lora_B.weight")}
    pairs = firsts & seconds
    others = [name for name in names if name.rpartition(".lora_")[0] not in pairs]
    return sorted(module.removeprefix(_PREFIX) for module in pairs), others


def factors(adapter: AdapterFolder) -> Iterator[Factors]:
    """The pairs, one in memory at a time; raises UsageError for a damaged file."""
    from safetensors import safe_open

    modules, _ = modules_of(tensor_names(adapter))
    # As torch tensors, for numpy has no bfloat16.
    with safe_open(adapter.path / TENSORS, "pt") as file:
        for module in modules:
            a, b = (file.get_tensor(f"{_PREFIX}{module}.lora_{factor}.weight").float().numpy() for factor in ("A", "B"))
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise UsageError(f"--adapter: the factors of {module} have the shapes {a.shape} and {b.shape}")
            yield Factors(module, a, b, scale_of(adapter.config, module, a.shape[0]))
