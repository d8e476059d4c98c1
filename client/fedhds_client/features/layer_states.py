"""Hidden states of the layers that a feature space names, without running the layers behind the highest of them."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from fedhds_client.features.projection import FeatureSpace

logger = logging.getLogger(__name__)

Inputs = Mapping[str, torch.Tensor]

# Rows and tokens of the batch on which both ways are compared.
_TRIAL_ROWS, _TRIAL_TOKENS = 2, 8
# Both ways compute the same; only a device that sums in another order each time gives others, in the last bits.
_TOLERANCE = 1e-3


class _Enough(Exception):
    """The highest layer that was asked for has its state."""


class LayerStates:
    """Takes the hidden states of some layers of one transformer body, which is in evaluation mode."""

    def __init__(self, body: nn.Module, space: FeatureSpace, inputs: Inputs) -> None:
        """Looks for the body's list of layers and tries it on a few tokens of `inputs`; without it the whole body runs.

        The last layer's state is taken behind the final norm, so it needs the whole body. Raises TaskError for a layer
        that is not there.
        """
        self._body, self._space = body, space
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
        self._layers: nn.ModuleList | None = None
        self._wanted: list[int] = []
        if space.layers in ("all", "last"):
            return
        trial = {name: value[:_TRIAL_ROWS, :_TRIAL_TOKENS] for name, value in inputs.items()}
        states = self._all(trial)
        self._wanted = space.layer_indices(len(states))
        if self._wanted[-1] == len(states) - 1:
            return
        self._layers = self._layers_that_give(states, trial)
        if self._layers is None:
            _say_whole(type(body).__name__)

    def of(self, inputs: Inputs) -> dict[int, torch.Tensor]:
        """Hidden states (batch, tokens, hidden) by layer, those of the space alone."""
        if self._layers is not None:
            return self._up_to(self._layers, inputs)
        states = self._all(inputs)
        return {layer: states[layer] for layer in self._space.layer_indices(len(states))}

    def _all(self, inputs: Inputs) -> list[torch.Tensor]:
        states = self._body(**inputs, output_hidden_states=True, **self._options).hidden_states
        return [self._of_rows(state, inputs) for state in states]

    def _up_to(self, layers: nn.ModuleList, inputs: Inputs) -> dict[int, torch.Tensor]:
        """The state of a layer is what the next one is given, so the body may stop where the last of these is."""
        states: dict[int, torch.Tensor] = {}

        def take(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == self._wanted[-1]:
                raise _Enough

        handles = [
            layers[layer].register_forward_pre_hook(
                lambda _module, args, kwargs, layer=layer: take(layer, args, kwargs), with_kwargs=True
            )
            for layer in self._wanted
        ]
        try:
            self._body(**inputs, **self._options)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {layer: self._of_rows(state, inputs) for layer, state in states.items()}

    def _layers_that_give(self, states: Sequence[torch.Tensor], trial: Inputs) -> nn.ModuleList | None:
        """The list of layers whose inputs are these states, as the whole body gives them; None: there is none."""
        for module in self._body.modules():
            if not isinstance(module, nn.ModuleList) or len(module) != len(states) - 1:
                continue
            try:
                found = self._up_to(module, trial)
            except KeyError:
                # Its modules get no hidden states.
                continue
            if all(layer in found and _alike(found[layer], states[layer]) for layer in self._wanted):
                return module
        return None

    def _of_rows(self, state: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """States of the rows' own tokens; prompt methods put positions of their own in front."""
        return _of_streams(state, self._body)[:, -inputs["input_ids"].shape[1] :]


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    scale = float(other.abs().max())
    return torch.allclose(one.float(), other.float(), rtol=_TOLERANCE, atol=_TOLERANCE * scale)


def _of_streams(state: torch.Tensor, body: Any) -> torch.Tensor:
    """Hidden states (batch, tokens, hidden) of a layer that keeps several streams beside each other: their mean."""
    if state.dim() == 3:
        return state
    # Gemma 3n has them in front of the batch, models with hyper-connections behind the tokens.
    in_front = hasattr(body.config.get_text_config(decoder=True), "altup_num_inputs")
    return state.mean(dim=0 if in_front else 2)


@functools.cache
def _say_whole(kind: str) -> None:
    """Once for each kind of model."""
    logger.info("features run all layers of a %s: its list of layers was not recognized", kind)
