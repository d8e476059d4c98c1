"""Early exit: the layers asked for, as the whole body gives them, and none behind them."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fedhds.errors import TaskError
from fedhds_client.features import layer_states
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.layer_states import LayerStates
from fedhds_client.features.projection import FeatureSpace
from tests.support.extraction import DIMENSION, HIDDEN, LAYERS, PAD, ROWS, SEED, VOCABULARY, llama

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def gpt2() -> Any:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128)
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    return BertModel(BertConfig(vocab_size=VOCABULARY, **sizes), add_pooling_layer=False).eval()


def adapted() -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(), config).eval()


def prompted() -> Any:
    return get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()


def layer_calls(model: Any) -> list[int]:
    """Notes the number of every layer that runs."""
    calls: list[int] = []
    (layers,) = (each for each in model.modules() if isinstance(each, nn.ModuleList) and len(each) == LAYERS)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: calls.append(number))
    return calls


def features(model: Any, layers: str, **options: Any) -> Any:
    space = FeatureSpace(SEED, DIMENSION, layers, **options)
    return extract_features(model, ROWS.__getitem__, range(len(ROWS)), space, pad_id=PAD, batch_size=4).values


@pytest.mark.parametrize("make", [llama, gpt2, bert, adapted, prompted])
@pytest.mark.parametrize("layers", ["middle", "0,2", "0"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_features_are_those_of_the_whole_body(
    monkeypatch: pytest.MonkeyPatch, make: Any, layers: str, pooling: str
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make()
    early = features(model, layers, pooling=pooling)
    monkeypatch.setattr(LayerStates, "_layers_that_give", lambda *_: None)
    np.testing.assert_allclose(early, features(model, layers, pooling=pooling), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layers", "run"), [("middle", 2), ("0", 0), ("0,1", 1), ("-2", 2), ("last", 3), ("1,-1", 3)])
def test_no_layer_behind_the_highest_one_runs(layers: str, run: int) -> None:
    model = llama()
    calls = layer_calls(model)
    space = FeatureSpace(SEED, DIMENSION, layers)
    inputs = {"input_ids": torch.tensor([ROWS[0]]), "attention_mask": torch.ones(1, len(ROWS[0]), dtype=torch.long)}
    with torch.inference_mode():
        states = LayerStates(model.model, space, inputs)
        calls.clear()
        taken = states.of(inputs)
    assert calls == list(range(run))
    assert sorted(taken) == space.layer_indices(LAYERS + 1)
    # No hook stays behind.
    calls.clear()
    model(**inputs)
    assert calls == list(range(LAYERS))


def test_a_body_without_a_list_of_layers_runs_whole_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    layer_states._say_whole.cache_clear()
    monkeypatch.setattr(layer_states, "_alike", lambda *_: False)
    model = llama()
    first, again = features(model, "middle"), features(model, "middle")
    assert np.array_equal(first, again)
    assert [r.getMessage() for r in caplog.records if "all layers" in r.getMessage()] == [
        "features run all layers of a LlamaModel: its list of layers was not recognized"
    ]


def test_middle_is_half_of_the_layers() -> None:
    assert [FeatureSpace(1, 2, "middle").layer_indices(count) for count in (2, 3, 4, 19)] == [[1], [1], [2], [9]]
    with pytest.raises(TaskError, match="names layer 7"):
        features(llama(), "7")
