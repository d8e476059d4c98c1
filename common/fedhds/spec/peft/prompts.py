"""Methods that put virtual tokens in front of every row: prompt tuning, prefix tuning and p-tuning."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal

from fedhds.errors import AdapterError
from fedhds.settings import parameter
from fedhds.spec.peft.base import MAX_FEATURES, PeftSpec, check_tensor

if TYPE_CHECKING:
    from pathlib import Path

    from fedhds.tensors.manifest import AdapterManifest

# First values of virtual tokens are uniform within it of 0 (Lester et al. 2021, 3.2, "random uniform").
TOKEN_BOUND: Final = 0.5
# The name and the role of what PEFT saves.
EMBEDDINGS: Final = "prompt_embeddings"


class PromptSpec(PeftSpec):
    """Base of the three."""

    num_virtual_tokens: int = parameter(
        20, "Virtual tokens in front of every row; they take positions of the model's longest row.", ge=1, le=4096
    )

    @property
    def roles(self) -> frozenset[str]:
        """Their embeddings."""
        return frozenset({EMBEDDINGS})

    @property
    def stated(self) -> dict[str, Any]:
        """How many there are, for a decoder alone."""
        return {"num_virtual_tokens": self.num_virtual_tokens, "num_transformer_submodules": 1}

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """One tensor, (virtual tokens, values of each), with one scale per token."""
        from fedhds.tensors.manifest import InitialKind

        expected = (self.num_virtual_tokens, self._values(manifest))
        if [(tensor.name, tensor.shape) for tensor in manifest.tensors] != [(EMBEDDINGS, expected)]:
            raise AdapterError(f"the manifest has other tensors than {EMBEDDINGS!r} of the shape {expected}")
        check_tensor(manifest.tensors[0], role=EMBEDDINGS, initial=InitialKind.UNIFORM, bound=TOKEN_BOUND, scale_axis=0)

    def _values(self, manifest: AdapterManifest) -> int:
        """Of each virtual token."""
        return configured(manifest, "token_dim")


class PromptTuningSpec(PromptSpec):
    """Prompt tuning (Lester et al. 2021, arXiv 2104.08691)."""

    summary = "embeddings of virtual tokens"

    method: Literal["prompt-tuning"] = "prompt-tuning"

    @property
    def stated(self) -> dict[str, Any]:
        """No text starts the tokens."""
        return {**super().stated, "prompt_tuning_init": "RANDOM"}


class PrefixTuningSpec(PromptSpec):
    """Prefix tuning (Li & Liang 2021, arXiv 2101.00190), without the projection, which PEFT does not save."""

    summary = "keys and values of virtual tokens in every layer"

    method: Literal["prefix-tuning"] = "prefix-tuning"

    @property
    def stated(self) -> dict[str, Any]:
        """Keys and values themselves train."""
        return {**super().stated, "prefix_projection": False}

    def _values(self, manifest: AdapterManifest) -> int:
        return 2 * configured(manifest, "num_layers") * configured(manifest, "token_dim")


class PTuningSpec(PromptSpec):
    """P-tuning (Liu et al. 2021, arXiv 2103.10385) with PEFT's MLP."""

    summary = "embeddings of virtual tokens, through a small network"

    method: Literal["p-tuning"] = "p-tuning"
    encoder_hidden_size: int = parameter(
        128, "Width of the network's hidden layers.", setting="encoder_hidden_size", ge=1, le=1 << 16
    )

    @property
    def roles(self) -> frozenset[str]:
        """What trains, not what PEFT saves."""
        return frozenset({"embedding", "mlp_weight", "mlp_bias"})

    @property
    def stated(self) -> dict[str, Any]:
        """The network's shape."""
        return {
            **super().stated,
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": 2,
        }

    def check_manifest(self, manifest: AdapterManifest) -> None:
        """The virtual tokens' inputs and three linear layers."""
        from fedhds.tensors.manifest import InitialKind

        width, hidden = configured(manifest, "token_dim"), self.encoder_hidden_size
        shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (self.num_virtual_tokens, width)}
        for layer, (inputs, outputs) in zip("024", ((width, hidden), (hidden, hidden), (hidden, width)), strict=True):
            shapes |= {f"mlp_head.{layer}.weight": (outputs, inputs), f"mlp_head.{layer}.bias": (outputs,)}
        if {tensor.name: tensor.shape for tensor in manifest.tensors} != shapes:
            raise AdapterError("the manifest has other tensors than the run's prompt encoder")
        for tensor in manifest.tensors:
            if tensor.name.endswith(".bias"):
                check_tensor(tensor, role="mlp_bias", initial=InitialKind.ZEROS, scale_axis=None)
                continue
            first = tensor.name == "embedding.weight"
            bound = TOKEN_BOUND if first else 1 / math.sqrt(tensor.shape[1])
            role = "embedding" if first else "mlp_weight"
            check_tensor(tensor, role=role, initial=InitialKind.UNIFORM, bound=bound, scale_axis=0)

    def peft_file(self, adapter: Path, manifest: AdapterManifest, scratch: Path) -> Path:
        """What the network gives: PEFT saves that, and nobody could train on from it."""
        from fedhds.tensors.prompt_encoder import write_prompt_embeddings

        write_prompt_embeddings(adapter, manifest, scratch, EMBEDDINGS)
        return scratch


def configured(manifest: AdapterManifest, key: str) -> int:
    """A size that adapter_config.json names; raises AdapterError for one that no model has."""
    value = manifest.parsed_config().get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_FEATURES:
        raise AdapterError(f"the adapter's configuration names no usable {key}")
    return value
