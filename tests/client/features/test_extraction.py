"""Features of a shard: right rows, right tokens, right layers, whatever the batching."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy.spatial.distance import pdist
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fedhds.errors import TaskError
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.projection import FeatureSpace, signs
from tests.support.extraction import DIMENSION, HIDDEN, LAYERS, PAD, ROWS, SEED, VOCABULARY, llama

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SPACE = FeatureSpace(SEED, DIMENSION)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(config)
    return model.eval()


def adapted() -> Any:
    """A Llama with a LoRA adapter that is not zero and would drop half of its input in training."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(
            llama(),
            LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
    return model.eval()


def prompted() -> Any:
    """A Llama behind a prompt of four embeddings, which are no layer of it."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    return model.eval()


MAKERS = {"llama": llama, "gpt2": gpt2, "adapted": adapted}


@functools.cache
def model_called(name: str) -> Any:
    return MAKERS[name]()


def one_by_one(model: Any, row: list[int]) -> npt.NDArray[np.float64]:
    """The full model on a single row, without padding: all layers end to end, then one projection."""
    states = layers_of(model, row)[:, -1].reshape(-1)
    matrix = np.concatenate(
        [signs(seed=SEED, layer=layer, hidden=HIDDEN, dimension=DIMENSION) for layer in range(LAYERS + 1)]
    )
    projected: npt.NDArray[np.float64] = states @ matrix / np.sqrt(DIMENSION)
    return projected


def layers_of(model: Any, row: list[int]) -> npt.NDArray[np.float64]:
    """Hidden states (layers, tokens, hidden) of a single row."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
    found: npt.NDArray[np.float64] = torch.cat(states).double().numpy()
    return found


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_give_what_single_rows_give(name: str, batch_size: int) -> None:
    model = model_called(name)
    features = extract_features(model, ROWS.__getitem__, range(len(ROWS)), SPACE, pad_id=PAD, batch_size=batch_size)
    assert features.ids.tolist() == list(range(len(ROWS)))
    assert features.values.shape == (len(ROWS), DIMENSION)
    assert features.values.dtype == np.float32
    for row, tokens in enumerate(ROWS):
        np.testing.assert_allclose(features.values[row], one_by_one(model, tokens), rtol=1e-4, atol=1e-5)


def test_a_prompt_shapes_the_features_and_is_no_part_of_a_row() -> None:
    model, mean = prompted(), FeatureSpace(SEED, DIMENSION, pooling="mean")

    def features(space: FeatureSpace, batch_size: int) -> npt.NDArray[np.float32]:
        rows = range(len(ROWS))
        return extract_features(model, ROWS.__getitem__, rows, space, pad_id=PAD, batch_size=batch_size).values

    np.testing.assert_allclose(features(mean, 4), features(mean, 1), rtol=1e-4, atol=1e-5)
    # The mean over a row of one token is that token's state, however long the prompt is.
    np.testing.assert_allclose(features(mean, 4)[1], one_by_one(model, ROWS[1]), rtol=1e-4, atol=1e-5)
    for row, values in enumerate(features(SPACE, 4)):
        np.testing.assert_allclose(values, one_by_one(model, ROWS[row]), rtol=1e-4, atol=1e-5)
        assert not np.allclose(values, one_by_one(model_called("llama"), ROWS[row]), rtol=1e-2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, len(ROWS) - 1), unique=True), st.integers(1, 4))
def test_ids_and_values_never_part(ids: list[int], batch_size: int) -> None:
    features = extract_features(model_called("llama"), ROWS.__getitem__, ids, SPACE, pad_id=PAD, batch_size=batch_size)
    assert features.ids.tolist() == ids
    assert features.values.shape == (len(ids), DIMENSION)
    for place, row in enumerate(ids):
        np.testing.assert_allclose(
            features.values[place], one_by_one(model_called("llama"), ROWS[row]), rtol=1e-4, atol=1e-5
        )


def test_rows_of_several_windows_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhds_client.features.extraction._WINDOW_BATCHES", 2)
    whole = extract_features(
        model_called("llama"), ROWS.__getitem__, range(len(ROWS)), SPACE, pad_id=PAD, batch_size=100
    )
    split = extract_features(model_called("llama"), ROWS.__getitem__, range(len(ROWS)), SPACE, pad_id=PAD, batch_size=2)
    np.testing.assert_allclose(split.values, whole.values, rtol=1e-4, atol=1e-5)


def test_the_padding_token_does_not_matter_even_where_it_ends_a_row() -> None:
    rows = [[1, 2, 9], [3, 4, 5, 6, 7, 9]]
    a = extract_features(model_called("llama"), rows.__getitem__, [0, 1], SPACE, pad_id=9, batch_size=2)
    b = extract_features(model_called("llama"), rows.__getitem__, [0, 1], SPACE, pad_id=0, batch_size=2)
    assert np.array_equal(a.values, b.values)
    np.testing.assert_allclose(a.values[0], one_by_one(model_called("llama"), rows[0]), rtol=1e-4, atol=1e-5)


def test_the_adapter_counts() -> None:
    model = model_called("adapted")
    with_adapter = extract_features(model, ROWS.__getitem__, [0, 1], SPACE, pad_id=PAD, batch_size=2)
    with model.disable_adapter():
        without = extract_features(model, ROWS.__getitem__, [0, 1], SPACE, pad_id=PAD, batch_size=2)
    assert not np.allclose(with_adapter.values, without.values, atol=1e-4)


def test_dropout_is_off_meanwhile_and_every_mode_is_given_back() -> None:
    model = adapted()
    expected = extract_features(model, ROWS.__getitem__, [2], SPACE, pad_id=PAD, batch_size=1)
    model.train()
    model.get_base_model().lm_head.eval()
    modes = [module.training for module in model.modules()]
    assert np.array_equal(
        extract_features(model, ROWS.__getitem__, [2], SPACE, pad_id=PAD, batch_size=1).values, expected.values
    )
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(("layers", "numbers"), [("all", [0, 1, 2, 3]), ("last", [3]), ("0,-2", [0, 2])])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("shared", [False, True])
def test_features_of_chosen_layers_and_poolings(layers: str, numbers: list[int], pooling: Any, shared: bool) -> None:
    space = FeatureSpace(SEED, DIMENSION, layers, pooling, shared)
    features = extract_features(
        model_called("llama"), ROWS.__getitem__, range(len(ROWS)), space, pad_id=PAD, batch_size=4
    )
    for row, tokens in enumerate(ROWS):
        states = layers_of(model_called("llama"), tokens)
        expected = np.zeros(DIMENSION)
        for layer in numbers:
            pooled = states[layer, -1] if pooling == "last" else states[layer].mean(axis=0)
            if shared:
                pooled = pooled / np.linalg.norm(pooled) / np.sqrt(len(numbers))
            expected += pooled @ signs(seed=SEED, layer=layer, hidden=HIDDEN, dimension=DIMENSION)
        expected /= np.sqrt(DIMENSION)
        if shared:
            expected /= np.linalg.norm(expected)
        np.testing.assert_allclose(features.values[row], expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_the_model_does_not_have_is_named() -> None:
    space = FeatureSpace(SEED, DIMENSION, "0,4")
    with pytest.raises(TaskError, match=r"layer 4; the model has 0 .* to 3"):
        extract_features(model_called("llama"), ROWS.__getitem__, [0], space, pad_id=PAD, batch_size=1)


def test_shared_features_have_norm_one() -> None:
    space = FeatureSpace(SEED, DIMENSION, shared=True)
    features = extract_features(
        model_called("llama"), ROWS.__getitem__, range(len(ROWS)), space, pad_id=PAD, batch_size=4
    )
    np.testing.assert_allclose(np.linalg.norm(features.values, axis=1), 1, rtol=1e-6)


def test_the_projection_is_the_same_on_every_machine() -> None:
    """The digest was taken once; any other value would put two versions or machines into different spaces."""
    drawn = signs(seed=42, layer=3, hidden=100, dimension=33)
    assert drawn.shape == (100, 33)
    assert drawn.dtype == np.int8
    assert np.unique(drawn).tolist() == [-1, 1]
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "e44a8c211a331fe6"
    assert not np.array_equal(drawn, signs(seed=42, layer=4, hidden=100, dimension=33))


def test_the_projection_keeps_distances() -> None:
    """Johnson and Lindenstrauss: relative errors of squared distances fall with the square root of the dimension."""
    points = np.random.default_rng(0).normal(size=(40, 500))
    projected = points @ signs(seed=1, layer=0, hidden=500, dimension=2048) / np.sqrt(2048)
    ratios = pdist(projected, "sqeuclidean") / pdist(points, "sqeuclidean")
    assert abs(ratios.mean() - 1) < 0.02
    assert ratios.std() < 0.05


def test_features_agree_between_thread_counts() -> None:
    rows = [list(np.random.default_rng(row).integers(1, VOCABULARY, size=60)) for row in range(32)]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            space = FeatureSpace(SEED, DIMENSION, shared=True)
            found.append(extract_features(llama(), rows.__getitem__, range(32), space, pad_id=PAD, batch_size=8).values)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)


def test_an_encoder_gives_features_too() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                intermediate_size=32,
            ),
            add_pooling_layer=False,
        ).eval()
    features = extract_features(model, ROWS.__getitem__, range(len(ROWS)), SPACE, pad_id=PAD, batch_size=4)
    for row, tokens in enumerate(ROWS):
        np.testing.assert_allclose(features.values[row], one_by_one(model, tokens), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_inside_the_model() -> None:
    model = llama().to(torch.bfloat16)
    features = extract_features(model, ROWS.__getitem__, [0, 2], SPACE, pad_id=PAD, batch_size=2)
    assert features.values.dtype == np.float32
    np.testing.assert_allclose(features.values[1], one_by_one(model_called("llama"), ROWS[2]), atol=0.1)


def test_no_row_has_a_width_still() -> None:
    features = extract_features(model_called("llama"), ROWS.__getitem__, [], SPACE, pad_id=PAD, batch_size=2)
    assert features.values.shape == (0, DIMENSION)


def test_the_language_head_is_not_run() -> None:
    model = llama()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    extract_features(model, ROWS.__getitem__, [0], SPACE, pad_id=PAD, batch_size=1)


def test_progress_rises_to_one_and_can_stop_the_work() -> None:
    shares: list[float] = []
    model = adapted().train()
    extract_features(model, ROWS.__getitem__, range(11), SPACE, pad_id=PAD, batch_size=2, progress=shares.append)
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (6, 1.0)

    class Stopped(Exception):
        pass

    def stop(share: float) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        extract_features(model, ROWS.__getitem__, range(11), SPACE, pad_id=PAD, batch_size=2, progress=stop)
    assert model.training


def test_a_row_without_tokens_is_named() -> None:
    with pytest.raises(ValueError, match="row 1 "):
        extract_features(model_called("llama"), [[1], []].__getitem__, [0, 1], SPACE, pad_id=PAD, batch_size=2)


def test_a_diverged_model_is_an_error() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(TaskError, match="not finite"):
        extract_features(model, ROWS.__getitem__, [0], SPACE, pad_id=PAD, batch_size=1)


def test_a_float32_adapter_on_a_bfloat16_base_counts_too() -> None:
    """What a site has on a GPU."""
    model = adapted().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    features = extract_features(model, ROWS.__getitem__, [0, 2], SPACE, pad_id=PAD, batch_size=2)
    reference = extract_features(model_called("adapted"), ROWS.__getitem__, [0, 2], SPACE, pad_id=PAD, batch_size=2)
    np.testing.assert_allclose(features.values, reference.values, atol=0.2)
