"""A look at a loaded model with a few tokens: is it a causal language model of text, and which layers text reaches."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from fedhds.errors import ModelError, TaskError

if TYPE_CHECKING:
    from fedhds_client.models.loading import BaseModel

_TEXT = "The quick brown fox jumps over the lazy dog."
_LENGTH = 8
# Later tokens change earlier values of a model that reads in both directions by far more, and rounding by far less;
# 16-bit types round a thousand times as coarsely.
_MAX_CHANGE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}
# Which experts a token goes to is not what adapters are for, and an expert that no token of a batch goes to does not
# train.
_MIXTURE = re.compile(r"(^|\.)(experts|gate|shared_expert_gate|\w*router\w*)(\.|$)")


@dataclass(frozen=True)
class LinearLayers:
    """Full names of a model's linear layers without its head, in its own order."""

    trainable: tuple[str, ...]
    """An adapter on them gets gradients from text."""
    others: tuple[str, ...]
    """No text reaches them, or the model reads their weights itself, or shares these with another layer."""

    @property
    def default(self) -> tuple[str, ...]:
        """Those that all-linear stands for: no routers and no experts."""
        return tuple(name for name in self.trainable if not _MIXTURE.search(name))


def check_causal(base: BaseModel) -> None:
    """Raises ModelError for a model that does not take text alone, or whose values depend on what comes later."""
    tokens = _tokens(base)
    half = len(tokens) // 2
    padding = [int(base.tokenizer.pad_token_id)] * (len(tokens) - half)
    ids = torch.tensor([tokens, tokens[:half] + padding], device=base.device)
    mask = torch.tensor([[1] * len(tokens), [1] * half + [0] * len(padding)], device=base.device)
    with torch.inference_mode():
        whole, start = _run(base, ids, mask)[:, :half].float()
    if not _change(whole, start) <= _MAX_CHANGE.get(base.model.dtype, 0.05):
        raise ModelError(
            f"{base.name} is not a causal language model: what it computes at a token depends on the tokens behind it, "
            "as in an encoder; choose another"
        )


def takes_left_padding(base: BaseModel) -> bool:
    """Whether answers to prompts that are padded on the left are those to the prompts alone.

    Models that count positions from the padding on, or have a state and no mask, give others. Raises TaskError for a
    model that transformers cannot generate with.
    """
    tokens = _tokens(base)
    half = len(tokens) // 2
    padding = [int(base.tokenizer.pad_token_id)] * half
    alone = torch.tensor([tokens[half:]], device=base.device)
    together = torch.tensor([tokens, padding + tokens[half:]], device=base.device)
    masks = torch.ones_like(alone), torch.tensor([[1] * len(tokens), [0] * half + [1] * half], device=base.device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        min_new_tokens=2,
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=padding[0],
        output_logits=True,
        return_dict_in_generate=True,
    )

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        steps = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=config).logits
        return torch.stack([step[-1] for step in steps]).float()

    try:
        with without_own_generation(base.model):
            first, second = run(alone, masks[0]), run(together, masks[1])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, NotImplementedError) as error:
        message = f"transformers {transformers.__version__} cannot generate answers with the model {base.name}"
        raise TaskError(f"{message} ({type(error).__name__})") from error
    return _change(first, second) <= _MAX_CHANGE.get(base.model.dtype, 0.05)


def linear_layers(base: BaseModel) -> LinearLayers:
    """The model's linear layers, told apart by one backward pass over a few tokens; the same at every site.

    Raises ModelError for a model that gives no gradients.
    """
    head = base.model.get_output_embeddings()
    uses = Counter(id(module.weight) for module in base.model.modules() if isinstance(module, nn.Linear | nn.Embedding))
    state_space = [module for module in base.model.modules() if _is_state_space(module)]
    # Fast kernels of state space models take the weights of all layers but the first, and only some machines have them.
    bypassed = {
        id(module)
        for layer in state_space
        for name, module in layer.named_children()
        if isinstance(module, nn.Linear) and name != "in_proj"
    }
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    possible: dict[str, nn.Module] = {
        name: module for name, module in linear.items() if uses[id(module.weight)] <= 1 and id(module) not in bypassed
    }
    taps: dict[str, list[torch.Tensor]] = {}
    tokens = torch.tensor([_tokens(base)], device=base.device)
    with torch.enable_grad(), _tapped(possible, taps):
        values = _run(base, tokens, torch.ones_like(tokens))
        names = [name for name, group in taps.items() for _ in group]
        flat = [tap for group in taps.values() for tap in group]
        try:
            gradients = torch.autograd.grad(values.float().sum(), flat, allow_unused=True) if flat else ()
        except RuntimeError as error:
            raise ModelError(f"{base.name} cannot be trained: it gives no gradients") from error
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return LinearLayers(
        tuple(name for name in linear if name in reached), tuple(name for name in linear if name not in reached)
    )


@contextmanager
def without_own_generation(model: Any) -> Iterator[None]:
    """Penalties, beams and the like of the model's own are off, which transformers would use where a call is silent."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _tapped(modules: dict[str, nn.Module], taps: dict[str, list[torch.Tensor]]) -> Iterator[None]:
    """Adds zeros to what `modules` give, where an adapter would add its output; collects them in `taps`."""

    def tap(name: str, module: Any) -> Any:
        inputs_width, outputs_width = _widths(module)

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor | None:
            # Routers give several values, grouped layers other shapes; PEFT's layers do neither.
            fits = (
                isinstance(output, torch.Tensor)
                and len(inputs) == 1
                and inputs[0].shape[-1] == inputs_width
                and output.shape == (*inputs[0].shape[:-1], outputs_width)
            )
            if not fits:
                return None
            zeros = torch.zeros_like(output, requires_grad=True)
            taps.setdefault(name, []).append(zeros)
            tapped: torch.Tensor = output + zeros
            return tapped

        return hook

    handles = [module.register_forward_hook(tap(name, module)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _change(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))


def _widths(module: Any) -> tuple[int, int]:
    """Features in and out."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return module.in_features, module.out_features


def _is_state_space(module: nn.Module) -> bool:
    """Whether it is a layer of Mamba's kind: only these have the state matrix and the skip of a state space model."""
    return hasattr(module, "A_log") and hasattr(module, "D")


def _tokens(base: BaseModel) -> list[int]:
    """A few tokens of plain text that the model has embeddings for."""
    size = base.model.get_input_embeddings().weight.shape[0]
    ids = base.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    plain = [token for token in ids if token < size] or [int(base.tokenizer.eos_token_id)]
    return (plain * _LENGTH)[:_LENGTH]


def _run(base: BaseModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The model's logits (batch, tokens, vocabulary)."""
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.model.forward).parameters else {}
    try:
        logits: torch.Tensor = base.model(input_ids=ids, attention_mask=mask, **options).logits
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"{base.name} does not compute on text alone ({type(error).__name__}); choose a language model of text"
        ) from error
    return logits
