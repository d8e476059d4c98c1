"""The interface of PEFT methods, and the manifest that PEFT's own state and configuration give."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedhds.tensors.manifest import AdapterManifest, FloatArray, Initial, TensorSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from fedhds.spec import RunSpec
    from fedhds_client.models.loading import BaseModel


class PeftMethod(ABC):
    """One method of PEFT as a run uses it.

    Implementations MUST give the same manifest at every site that holds the same base model.
    """

    @abstractmethod
    def config(self, spec: RunSpec, base: BaseModel) -> PeftConfig:
        """The configuration that PEFT puts an adapter on `base` by; raises ModelError when the model cannot carry it.

        Module names are resolved, so that the adapter fits the same modules wherever it is loaded.
        """

    @abstractmethod
    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """How the first value of a tensor is made that is none of `base_values`."""

    def role(self, spec: RunSpec, name: str) -> str:
        """What the tensor that PEFT saves under `name` is to the method: the last part of its name but `weight`."""
        return name.removesuffix(".weight").rpartition(".")[2]

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """The axis along which int8 keeps one scale per index; None: one scale for the whole tensor."""
        return None

    def check(self, module: Any, base: BaseModel) -> None:  # noqa: B027 - most need no trial
        """Raises ModelError when PEFT's wrapper `module` around `base` does not compute, or does not train."""

    def state(self, module: Any) -> Mapping[str, torch.Tensor]:
        """The tensors that the run sends, by name, as `module` has them: what PEFT saves, if training can go on there.

        Where a parameter is sent as it is, the tensor shares its memory.
        """
        return adapter_state(module)

    def load(self, module: Any, state: Mapping[str, torch.Tensor]) -> None:
        """Sets all tensors of `state`."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(module, dict(state))

    def base_values(self, module: Any) -> Mapping[str, FloatArray]:
        """First values that follow from the base model, float32 by name; the same bits at every site that has it."""
        return {}

    def manifest(self, spec: RunSpec, module: Any) -> AdapterManifest:
        """The manifest of the adapter that PEFT's wrapper `module` carries."""
        tensors, given = [], self.base_values(module)
        for name, tensor in sorted(self.state(module).items()):
            role, shape = self.role(spec, name), tuple(tensor.shape)
            initial = Initial.base(given[name]) if name in given else self.initial(spec, role, shape)
            tensors.append(TensorSpec(name, shape, role, initial, self.scale_axis(role, shape)))
        return AdapterManifest(tuple(tensors), _config_text(module.peft_config["default"], spec))


def adapter_state(module: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that PEFT saves them by."""
    # Here, so that methods can be registered before the program reads its flags.
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(module, save_embedding_layers=False))


def _config_text(config: PeftConfig, spec: RunSpec) -> str:
    """adapter_config.json as PEFT writes it, but the same at every site: no path of this machine, sets in order."""
    values = config.to_dict() | {
        "base_model_name_or_path": spec.model.name,
        "revision": spec.model.revision or None,
        "inference_mode": True,
    }
    return json.dumps(values, indent=2, sort_keys=True, default=sorted) + "\n"
