"""The base model with an adapter on it: the run's own, or one from a PEFT folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, XLoraConfig, get_peft_model, set_peft_model_state_dict

from fedhds.errors import AdapterError, ModelError, TaskError
from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS, Codec
from fedhds.tensors.manifest import AdapterManifest, FloatArray, Initial, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.models.loading import BaseModel, first_line
from fedhds_client.peft_methods import PEFT_METHODS
from fedhds_client.peft_methods.base import adapter_state


@dataclass
class InferenceModel:
    """A module to measure: the base model itself, or PEFT's wrapper around the base model with an adapter on it.

    `module` is what is called. `base.model` is the base model; some methods put the adapter's layers into it, others
    leave it as it is.
    """

    base: BaseModel
    module: Any

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        return self.base.tokenizer

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @property
    def virtual_tokens(self) -> int:
        """Positions in front of every row that the adapter takes."""
        return _virtual_tokens(getattr(self.module, "active_peft_config", None))

    def generate(self, **options: Any) -> Any:
        """What transformers' `generate` gives; virtual tokens are no part of it."""
        with warnings.catch_warnings():
            # PEFT drops those that transformers makes of the mask, and the model counts again, with virtual tokens.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            return self.module.generate(**options)

    def merged(self) -> Any:
        """The base model with the adapter in its weights; raises ModelError, saying why, when it cannot be there."""
        fault = "its virtual tokens are in no weight" if self.virtual_tokens else ""
        try:
            if not fault:
                return self.module.merge_and_unload()
        except (AttributeError, NotImplementedError, ValueError) as error:
            fault = first_line(error)
        raise ModelError(f"PEFT cannot merge this kind of adapter into {self.base.name}: {fault}")

    @property
    def max_length(self) -> int:
        """The longest row in tokens: the base model's without the virtual tokens."""
        return self.base.max_length - self.virtual_tokens

    @property
    def left_padding(self) -> bool:
        """Whether it answers padded prompts as it answers them alone; raises TaskError.

        PEFT puts virtual tokens in front of the padding, where they are farther away; prefixes are in the cache.
        """
        return (not self.virtual_tokens or self.has_prefix) and self.base.left_padding

    @property
    def has_prefix(self) -> bool:
        """Whether its virtual tokens are in the cache of keys and values, not in front of the row."""
        return bool(self.virtual_tokens and self.module.active_peft_config.peft_type == PeftType.PREFIX_TUNING)

    @classmethod
    def with_adapter(cls, base: BaseModel, folder: Path) -> InferenceModel:
        """The base model with the adapter of a PEFT folder; raises ModelError when the two do not fit."""
        # Read here and not by PEFT, which only warns of missing tensors and asks the hub for missing files.
        module = _wrapped(base, _folder_config(folder))
        shapes = {name: tuple(tensor.shape) for name, tensor in adapter_state(module).items()}
        # Only names and shapes count for reading.
        tensors = tuple(TensorSpec(name, shapes[name], "any", Initial.zeros(), None) for name in sorted(shapes))
        try:
            state = _read(AdapterManifest(tensors, "{}"), folder / "adapter_model.safetensors")
            set_peft_model_state_dict(module, state)
        except (AdapterError, OSError) as error:
            raise ModelError(f"the adapter {folder} does not fit the base model {base.name}: {error}") from error
        return cls(base, module)


class AdapterModel(InferenceModel):
    """The base model with one adapter in float32, put into `base.model` itself; the base weights are frozen."""

    def __init__(self, base: BaseModel, spec: RunSpec) -> None:
        """A new adapter as the run wants it; raises ModelError when the model cannot carry it."""
        method = PEFT_METHODS[spec.peft.method]
        self._spec = spec
        super().__init__(base, _wrapped(base, method.config(spec, base)))
        method.check(self.module, base)
        self._method = method
        self._manifest = method.manifest(spec, self.module)

    def manifest(self) -> AdapterManifest:
        """The adapter's tensors, named as PEFT saves them, and its configuration."""
        return self._manifest

    def parameters(self, roles: frozenset[str] = frozenset()) -> list[torch.nn.Parameter]:
        """The adapter's parameters, of the tensors with these roles; without roles all of them.

        Raises TaskError for a PEFT method whose saved tensors are not its parameters.
        """
        own = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if not roles:
            return own
        state = self._method.state(self.module)
        addresses = {state[spec.name].data_ptr() for spec in self._manifest.tensors if spec.role in roles}
        selected = [parameter for parameter in own if parameter.data_ptr() in addresses]
        if len(selected) != len(addresses) or not selected:
            raise TaskError(
                f"this PEFT method cannot train {', '.join(sorted(roles))} alone; use another --aggregator, which the "
                "operator of the coordinator sets"
            )
        return selected

    def load(self, path: Path) -> None:
        """Sets the adapter from a safetensors file; raises AdapterError when it does not fit."""
        self._method.load(self.module, _read(self._manifest, path))

    def truncate(self, rank: int) -> None:
        """Leaves LoRA its first `rank` directions, which the aggregator svd orders by strength.

        The others are zeros in both factors: they have no gradient, so training leaves them, and so has the update.
        Raises TaskError in a run whose aggregator does not order them.
        """
        rule = self._spec.aggregation.aggregator
        if not rule.orders_directions:
            raise TaskError(
                f"--max-lora-rank takes a run with --aggregator svd, this one has {rule.name}, which does not order "
                "LoRA's directions; start the site without it, or let the run's operator set svd"
            )
        state = self._method.state(self.module)
        with torch.no_grad():
            for spec in self._manifest.tensors:
                directions = state[spec.name] if spec.role == "lora_A" else state[spec.name].T
                directions[rank:] = 0

    @property
    def codec(self) -> Codec:
        """How the run's updates are written."""
        return CODECS[self._spec.aggregation.wire_dtype]

    def values(self) -> Callable[[TensorSpec], FloatArray]:
        """The adapter's tensors, float32 on the CPU."""
        state = self._method.state(self.module)
        return lambda spec: state[spec.name].detach().cpu().numpy()

    def write_first_values(self, path: Path) -> Artifact | None:
        """Writes the tensors whose first values follow from the base model; None when there are none."""
        manifest = self._manifest.from_base
        if not manifest.tensors:
            return None
        values = self._method.base_values(self.module)
        return write_adapter(path, manifest, lambda spec: values[spec.name], "float32")

    def save(self, path: Path) -> Artifact:
        """Writes the adapter in the run's type of global adapters."""
        return write_adapter(path, self._manifest, self.values(), self._spec.aggregation.adapter_dtype)


def virtual_tokens_of(folder: Path) -> int:
    """Positions in front of every row that the adapter of a PEFT folder takes; raises ModelError."""
    return _virtual_tokens(_folder_config(folder))


def _virtual_tokens(config: Any) -> int:
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def _folder_config(folder: Path) -> PeftConfig:
    """The configuration of a PEFT folder, read by PEFT's class for its `peft_type`; raises ModelError."""
    file = folder / "adapter_config.json"
    try:
        # PEFT would ask the hub for a missing file.
        if not file.is_file():
            raise FileNotFoundError(file)
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
        if config.peft_type is None:
            raise ValueError("it names no kind of adapter")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} does not describe an adapter that the installed PEFT knows") from error
    if isinstance(config, XLoraConfig):
        raise ModelError(f"{file} describes a mixture of other adapters (X-LoRA); use one adapter alone")
    # What a folder holds is used, not trained; and PEFT would load a tokenizer from the hub to start a new prompt.
    config.inference_mode = True
    return config


def _wrapped(base: BaseModel, config: PeftConfig) -> Any:
    """PEFT's wrapper around the base model, with the adapter in float32 and dropout off."""
    # PEFT warns when it replaces another name.
    config.base_model_name_or_path = None
    own = {id(parameter) for parameter in base.model.parameters()}
    try:
        with warnings.catch_warnings():
            # GPT-2's Conv1D keeps its weights transposed. PEFT sees that at every module, whatever the configuration
            # says (so a checkpoint's may say False), and warns.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT 0.21 asks transformers 5 for a name that it is about to rename.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # What it means is said when somebody merges.
            warnings.filterwarnings("ignore", message="Detected that the base layer has no bias term")
            module: Any = get_peft_model(base.model, config, autocast_adapter_dtype=False)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"the adapter does not fit the base model {base.name}: {first_line(error)}") from error
    for parameter in module.parameters():
        if id(parameter) not in own:
            parameter.data = parameter.data.float()
    return module.eval()


def _read(manifest: AdapterManifest, path: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's file; raises AdapterError when they are not those of `manifest`."""
    with AdapterReader(path, manifest) as reader:
        return {spec.name: torch.from_numpy(reader.tensor(spec)) for spec in manifest.tensors}
