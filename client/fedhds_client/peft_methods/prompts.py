"""Virtual tokens in front of every row: prompt tuning, prefix tuning and p-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from fedhds.errors import ModelError
from fedhds.spec import PromptSpec, PTuningSpec, RunSpec
from fedhds.spec.peft.prompts import EMBEDDINGS, TOKEN_BOUND
from fedhds.tensors.manifest import Initial
from fedhds_client.peft_methods.base import PeftMethod

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from fedhds_client.models.loading import BaseModel

# What is tried is a row of so many tokens.
_TRIAL_TOKENS = 4


class _PromptMethod(PeftMethod):
    """What the three share: one encoder of the virtual tokens, which all its tensors are of."""

    label: ClassVar[str]

    def state(self, module: Any) -> Mapping[str, torch.Tensor]:
        # PEFT's own state is a copy, while training.
        return {EMBEDDINGS: _encoder(module).embedding.weight}

    def load(self, module: Any, state: Mapping[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, tensor in self.state(module).items():
                tensor.copy_(state[name])

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Uniform; zeros would keep the keys and values of all tokens equal."""
        return Initial.uniform(TOKEN_BOUND)

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """One scale per virtual token."""
        return 0

    def check(self, module: Any, base: BaseModel) -> None:
        """Tries one row: PEFT changes inputs or caches in ways that some architectures do not take."""
        import torch

        ids = torch.full((1, _TRIAL_TOKENS), int(base.tokenizer.pad_token_id), device=base.device)
        trained = list(_encoder(module).parameters())
        mode = module.training
        try:
            with torch.enable_grad():
                logits = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
                gradients = torch.autograd.grad(logits[:, -1].float().logsumexp(-1).sum(), trained, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
            raise self._unfit(base, f"{type(error).__name__} in a trial") from error
        finally:
            module.train(mode)
        if any(gradient is None for gradient in gradients):
            raise self._unfit(base, "no gradient reaches its virtual tokens")

    def _unfit(self, base: BaseModel, fault: str) -> ModelError:
        return ModelError(
            f"{self.label} does not work with {base.name} ({fault}); the operator of the coordinator sets --peft-method"
        )

    def _sizes(self, spec: RunSpec, base: BaseModel) -> dict[str, Any]:
        """How many tokens there are; raises ModelError when they leave no room for a row."""
        prompt = spec.peft
        assert isinstance(prompt, PromptSpec)
        if prompt.num_virtual_tokens > base.max_length // 2:
            raise ModelError(
                f"{base.name} reads {base.max_length} tokens, and {prompt.num_virtual_tokens} virtual ones take more "
                "than half of them; the operator of the coordinator lowers --num-virtual-tokens"
            )
        return {"num_virtual_tokens": prompt.num_virtual_tokens, "task_type": "CAUSAL_LM"}


class PromptTuning(_PromptMethod):
    """Embeddings of the tokens (Lester et al. 2021)."""

    label = "prompt tuning"

    def config(self, spec: RunSpec, base: BaseModel) -> PeftConfig:
        """Random tokens; PEFT's start from a text would need the base model at the coordinator."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(**self._sizes(spec, base))


class PrefixTuning(_PromptMethod):
    """Keys and values of the tokens in every layer (Li & Liang 2021)."""

    label = "prefix tuning"

    def config(self, spec: RunSpec, base: BaseModel) -> PeftConfig:
        """Without the projection, of which PEFT saves only what it gives."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(**self._sizes(spec, base))


class PTuning(_PromptMethod):
    """Embeddings of the tokens behind an MLP (Liu et al. 2021), whose own tensors are sent.

    PEFT saves what the MLP gives, from which nobody could train on; `PTuningSpec.peft_file` makes that of them.
    """

    label = "p-tuning"

    def config(self, spec: RunSpec, base: BaseModel) -> PeftConfig:
        """The MLP, which PEFT recommends, not the LSTM."""
        from peft import PromptEncoderConfig

        assert isinstance(spec.peft, PTuningSpec)
        return PromptEncoderConfig(encoder_hidden_size=spec.peft.encoder_hidden_size, **self._sizes(spec, base))

    def state(self, module: Any) -> Mapping[str, torch.Tensor]:
        return dict(_encoder(module).named_parameters())

    def role(self, spec: RunSpec, name: str) -> str:
        """The tokens, the MLP's weights, its biases."""
        return "embedding" if name == "embedding.weight" else f"mlp_{name.rpartition('.')[2]}"

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        """Uniform tokens; torch's start of linear layers for the weights; zeros for the biases."""
        if role == "mlp_bias":
            return Initial.zeros()
        return Initial.uniform(TOKEN_BOUND if role == "embedding" else 1 / math.sqrt(shape[1]))

    def scale_axis(self, role: str, shape: tuple[int, ...]) -> int | None:
        """One scale per virtual token or output; one for a bias."""
        return None if role == "mlp_bias" else 0


def _encoder(module: Any) -> Any:
    return module.prompt_encoder["default"]
