"""Every architecture that transformers loads as a causal language model works, or is refused by a message of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoTokenizer

from fedhds.errors import ModelError, TaskError
from fedhds.tensors.safetensors import write_adapter
from fedhds_client.data.prompts import Encoded
from fedhds_client.evaluation import generation
from fedhds_client.evaluation.generation import generate
from fedhds_client.features import layer_states
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.layer_states import LayerStates
from fedhds_client.features.projection import FeatureSpace
from fedhds_client.models.adapter import AdapterModel, InferenceModel
from fedhds_client.models.loading import BaseModel
from fedhds_client.models.probing import check_causal
from fedhds_client.training.response_loss import ResponseLoss
from tests.support.architectures import ARCHITECTURES, tiny_config, tiny_model
from tests.support.model_folders import spec_of
from tests.support.tiny import make_model

# What transformers cannot make here, by the exception that it raises.
UNBUILDABLE = {
    "gemma3n": "requires the timm library",
    # They read the cache of the model that they draft for.
    "gemma4_assistant": "The set of layer types producing a cache",
    "gemma4_unified_assistant": "The set of layer types producing a cache",
    "musicgen": "'MusicgenConfig' object has no attribute 'dropout'",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute 'dropout'",
}
# What we refuse, by our message.
REFUSED = {
    # Both read rows in both directions, or a prompt of their own as a part of each.
    "cpmant": "cpmant is not a causal language model",
    "xlnet": "xlnet is not a causal language model",
    # Its layers compute their gradients themselves, and only for their own weights.
    "reformer": "LoRA can train no linear layer of reformer; the operator of the coordinator sets --model",
}
# Features run all of their layers, as the input of a layer is not the hidden state before it.
WHOLE = {"blt", "falcon_mamba", "hrm_text", "mamba", "mamba2", "prophetnet", "rwkv"}
# Its relative positions depend on how long a row with its padding is.
LOSS_TOLERANCE = {"prophetnet": 1e-3}

# What most people tune, and one of each kind that once failed; `make test-slow` tries all others.
COMMON = {
    *("bloom", "ctrl", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite"),
    *("llama", "mistral", "mixtral", "mpt", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe"),
}

# Of these, those that `make test-fast` leaves out.
SLOW = (COMMON | WHOLE) - {"gemma3_text", "gpt2", "llama", "mamba", "opt", "phi", "qwen3"}

ROWS = [[5, 9, 40, 77, 12, 33, 8, 64, 100, 7], [7, 8, 33, 20], [90, 91, 92, 93, 94, 95, 9]]
STARTS = (4, 1, 3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all: it only has to have the models' vocabulary."""
    return AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("llama")))


def test_the_exceptions_are_architectures() -> None:
    assert COMMON | WHOLE | set(UNBUILDABLE) | set(REFUSED) <= set(ARCHITECTURES)
    assert len(ARCHITECTURES) > 150


# BigBird-Pegasus never ties the two, though its configuration says so.
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied after merging")
@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name in SLOW)
            + [pytest.mark.long] * (name not in COMMON | UNBUILDABLE.keys() | REFUSED.keys() | WHOLE),
        )
        for name in ARCHITECTURES
    ],
)
def test_the_architecture(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    if architecture in UNBUILDABLE:
        with pytest.raises((ImportError, AttributeError, ValueError), match=UNBUILDABLE[architecture]):
            tiny_model(tiny_config(architecture))
        return
    model = tiny_model(tiny_config(architecture))
    plain = copy.deepcopy(model)
    base = BaseModel(architecture, model, tokenizer, 256, torch.float32, ())
    if architecture in REFUSED:
        with pytest.raises(ModelError, match=REFUSED[architecture]):
            _adapter_on(base)
        return
    adapter = _adapter_on(base)
    manifest = adapter.manifest()
    spec_of(lora_rank=2).peft.check_manifest(manifest)
    assert type(manifest).from_proto(manifest.to_proto()) == manifest
    file = tmp_path / "adapter_model.safetensors"
    write_adapter(file, manifest, lambda tensor: tensor.initial_value(3) + 0.05, "float32")
    (tmp_path / "adapter_config.json").write_text(manifest.config)
    adapter.load(file)
    theirs: Any = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    loss = _losses_agree(adapter, theirs, LOSS_TOLERANCE.get(architecture, 1e-4))
    _all_of_it_trains(adapter, loss)
    _features_do_not_depend_on_the_batch(adapter)
    _layers_behind_the_middle_do_not_run(adapter, whole=architecture in WHOLE)
    merged = _logits(theirs.merge_and_unload(), ROWS[0])
    torch.testing.assert_close(merged, _logits(adapter.module, ROWS[0]), rtol=1e-4, atol=1e-4)


def _adapter_on(base: BaseModel) -> AdapterModel:
    """As when a site loads a model."""
    check_causal(base)
    return AdapterModel(base, spec_of(lora_rank=2))


def _logits(module: Any, row: list[int]) -> torch.Tensor:
    """Of one row without padding, (tokens, vocabulary)."""
    ids = torch.tensor([row])
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    return logits


def _losses_agree(adapter: AdapterModel, theirs: Any, tolerance: float) -> torch.Tensor:
    """That of a batch is the sum of the rows' under transformers and PEFT alone; returned with its gradient."""
    batch = [
        Encoded(ids, [place >= start for place in range(len(ids))], start, None, False)
        for ids, start in zip(ROWS, STARTS, strict=True)
    ]
    total, tokens = ResponseLoss(adapter)(batch)
    assert tokens == sum(len(ids) - start for ids, start in zip(ROWS, STARTS, strict=True))
    expected = 0.0
    for ids, start in zip(ROWS, STARTS, strict=True):
        logits = _logits(theirs, ids)[start - 1 : -1]
        expected += float(functional.cross_entropy(logits.float(), torch.tensor(ids[start:]), reduction="sum"))
    assert float(total.detach()) == pytest.approx(expected, rel=tolerance)
    return total


def _all_of_it_trains(adapter: AdapterModel, loss: torch.Tensor) -> None:
    torch.autograd.backward(loss)
    named = dict(adapter.module.named_parameters())
    idle = [name for name, one in named.items() if one.requires_grad and (one.grad is None or not one.grad.any())]
    assert not idle
    assert all(one.grad is None for one in named.values() if not one.requires_grad)


def _features_do_not_depend_on_the_batch(adapter: AdapterModel) -> None:
    space = FeatureSpace(5, 16)

    def features(batch_size: int) -> Any:
        options: Any = {"pad_id": 0, "batch_size": batch_size}
        return extract_features(adapter.module, ROWS.__getitem__, range(len(ROWS)), space, **options).values

    alone, together = features(1), features(len(ROWS))
    assert np.isfinite(alone).all()
    np.testing.assert_allclose(together, alone, rtol=1e-3, atol=1e-3 * np.abs(alone).max())


def _layers_behind_the_middle_do_not_run(adapter: AdapterModel, *, whole: bool) -> None:
    """Features of a middle layer are those that the whole body gives."""
    space = FeatureSpace(5, 16, "middle")

    def features() -> Any:
        options: Any = {"pad_id": 0, "batch_size": len(ROWS)}
        return extract_features(adapter.module, ROWS.__getitem__, range(len(ROWS)), space, **options).values

    with patch.object(layer_states, "_say_whole") as said:
        early = features()
    assert said.called is whole
    with patch.object(LayerStates, "_layers_that_give", lambda *_: None):
        np.testing.assert_allclose(early, features(), rtol=1e-4, atol=1e-5 * np.abs(early).max())


@pytest.mark.parametrize(
    ("architecture", "together"),
    [
        *((name, True) for name in ("llama", "gpt2", "mamba", "bloom", "gemma3_text", "qwen2")),
        # They count positions from the padding on, or have a state and no mask.
        *((name, False) for name in ("git", "mbart", "rwkv", "deepseek_v4")),
    ],
)
def test_answers_do_not_depend_on_the_batch(architecture: str, together: bool, tokenizer: Any) -> None:
    model = tiny_model(tiny_config(architecture))
    base = BaseModel(architecture, model, tokenizer, 256, torch.float32, ())
    assert base.left_padding is together
    prompter: Any = SimpleNamespace(
        encode_prompt=lambda row, reserve: SimpleNamespace(input_ids=row),
        answer=lambda text: text,
        max_length=64,
        stop_ids=[2],
    )
    rows: Any = ROWS
    # A batch is generated in parts, of which the later ones go on with the cache.
    with patch.object(generation, "_PART", 2):
        answers = generate(InferenceModel(base, model), prompter, rows, 6)
    assert answers == [generate(InferenceModel(base, model), prompter, [row], 6)[0] for row in rows]
    assert len(set(answers)) > 1


def test_a_model_that_transformers_cannot_generate_with_is_named(tokenizer: Any) -> None:
    base = BaseModel("blt", tiny_model(tiny_config("blt")), tokenizer, 256, torch.float32, ())
    with pytest.raises(TaskError, match="cannot generate answers with the model blt"):
        base.left_padding  # noqa: B018


@pytest.mark.parametrize("architecture", ["bert", "roberta", "xlm"])
def test_a_model_that_reads_in_both_directions_is_refused(architecture: str, tokenizer: Any) -> None:
    config = tiny_config(architecture)
    setattr(config, "causal" if architecture == "xlm" else "is_decoder", False)
    with pytest.raises(ModelError, match="not a causal language model: what it computes at a token depends on"):
        check_causal(BaseModel("m", tiny_model(config), tokenizer, 256, torch.float32, ()))


def _targets(architecture: str, tokenizer: Any, **fields: Any) -> list[str]:
    """Names of the layers with an adapter."""
    base = BaseModel("org/m", tiny_model(tiny_config(architecture)), tokenizer, 256, torch.float32, ())
    names = [tensor.name for tensor in AdapterModel(base, spec_of(lora_rank=2, **fields)).manifest().tensors]
    return [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in names if "lora_A" in name]


def test_all_linear_leaves_out_what_text_does_not_train(tokenizer: Any) -> None:
    def last(architecture: str) -> set[str]:
        return {name.rpartition(".")[2] for name in _targets(architecture, tokenizer)}

    # A vision tower and its projector; its layers have the names of those of the language model.
    dense = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    gemma = _targets("gemma3", tokenizer)
    assert all(name.startswith("model.language_model.layers.") for name in gemma)
    assert {name.rpartition(".")[2] for name in gemma} == dense
    # Routers and fused experts; dense layers that have names which PEFT takes for those of experts.
    assert last("phimoe") == last("mixtral") == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert last("deepseek_v3") == {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert not [name for name in _targets("hunyuan_v1_moe", tokenizer) if "gate.wg" in name]
    # Layers whose weights fast kernels read themselves.
    assert last("mamba") == last("mamba2") == {"in_proj"}
    # Attention to an encoder that is not there.
    assert not [name for name in _targets("mbart", tokenizer) if "encoder_attn" in name]
    # Blocks named like layers: CTRL's feed-forward layers are called 0 and 2.
    assert "0" in last("ctrl")


@pytest.mark.parametrize(
    ("architecture", "target", "message"),
    [
        ("mamba", "c_attn", "names 'c_attn', which this model does not have; it has in_proj$"),
        ("mamba", "out_proj", "names 'out_proj', on which an adapter would not train in this model; it has in_proj$"),
        (
            "phimoe",
            "router",
            "names 'router', on which an adapter would not train in this model; it has k_proj, o_",
        ),
        ("mixtral", "w1", "names 'w1', which this model does not have"),
        ("gemma3", "fc1", "names 'fc1', on which an adapter would not train"),
    ],
)
def test_a_target_that_cannot_be_names_the_flag_and_who_sets_it(
    architecture: str, target: str, message: str, tokenizer: Any
) -> None:
    with pytest.raises(ModelError, match="--lora-targets, which the operator of the coordinator sets, " + message):
        _targets(architecture, tokenizer, lora_targets=(target,))


def test_named_targets_leave_out_towers_too(tokenizer: Any) -> None:
    names = _targets("gemma3", tokenizer, lora_targets=("q_proj", "v_proj"))
    assert len(names) == 2 * 2
    assert all("language_model" in name for name in names)
    # A router that is a linear layer may be named.
    assert _targets("hunyuan_v1_moe", tokenizer, lora_targets=("wg",))
