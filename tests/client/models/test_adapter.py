"""Adapters on a base model: what PEFT reads, what does not fit, and a configuration that is the same at every site."""

from __future__ import annotations

import copy
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from fedhds.errors import AdapterError, ModelError
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.models.adapter import AdapterModel, InferenceModel
from fedhds_client.models.loading import load_base_model
from tests.support.model_folders import copy_model, edit_json, spec_of
from tests.support.tiny import make_model

IDS = torch.tensor([[5, 9, 40, 77, 12]])


def random_adapter(adapter: AdapterModel, path: Path) -> Path:
    # B is zero in a first adapter; any other tensor's draw makes it count.
    write_adapter(path, adapter.manifest(), lambda spec: spec.initial_value(3) + 0.05, "float32")
    return path


def logits_of(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=IDS).logits
    return logits


def test_peft_reads_what_is_saved_and_computes_the_same(tmp_path: Path, any_model: Path) -> None:
    base = load_base_model(str(any_model), device="cpu")
    spec = spec_of(any_model)
    plain = logits_of(base.model)
    adapter = AdapterModel(base, spec)
    assert torch.equal(logits_of(adapter.module), plain)
    adapter.load(random_adapter(adapter, tmp_path / "random"))
    changed = logits_of(adapter.module)
    assert not torch.allclose(changed, plain, atol=1e-2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    artifact = adapter.save(folder / "adapter_model.safetensors")
    assert artifact.size == (folder / "adapter_model.safetensors").stat().st_size
    (folder / "adapter_config.json").write_text(adapter.manifest().config)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(any_model), folder).eval()
    assert torch.equal(logits_of(theirs), changed)
    ours = InferenceModel.with_adapter(load_base_model(str(any_model), device="cpu"), folder)
    assert torch.equal(logits_of(ours.module), changed)


def test_the_manifest_is_sorted_resolved_and_of_lora_factors(any_model: Path) -> None:
    base = load_base_model(str(any_model), device="cpu")
    linear = [module for module in base.model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    manifest = AdapterModel(base, spec_of()).manifest()
    assert type(manifest).from_proto(manifest.to_proto()) == manifest
    # A and B for all but the output head.
    assert len(manifest.tensors) == 2 * (len(linear) - 1)
    assert {(tensor.role, tensor.initial.kind.value, tensor.scale_axis) for tensor in manifest.tensors} == {
        ("lora_A", "uniform", 0),
        ("lora_B", "zeros", 1),
    }
    for tensor in manifest.tensors:
        assert tensor.name.endswith(f".{tensor.role}.weight")
        assert tensor.initial.bound == (1 / np.sqrt(tensor.shape[1]) if tensor.role == "lora_A" else 0)
    targets = manifest.parsed_config()["target_modules"]
    # Never all-linear: what it stands for is resolved at the sites.
    assert "all-linear" not in targets
    assert targets == sorted(targets)


def test_the_configuration_has_the_runs_values_and_is_the_same_at_every_site(tmp_path: Path, llama: Path) -> None:
    spec = spec_of("org/base", lora_rank=3, lora_alpha=7.5, lora_dropout=0.25, lora_targets=("v_proj", "q_proj"))
    manifests = [
        AdapterModel(load_base_model(str(folder), device="cpu"), spec).manifest()
        for folder in (llama, copy_model(llama, tmp_path / "elsewhere"))
    ]
    assert manifests[0] == manifests[1]
    text, config = manifests[0].config, manifests[0].parsed_config()
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"
    assert str(llama) not in text
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", None)
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7.5, 0.25)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["inference_mode"] is True
    pinned = AdapterModel(load_base_model(str(llama), device="cpu"), spec_of("org/base", model_revision="v1"))
    assert pinned.manifest().parsed_config()["revision"] == "v1"


def test_only_the_adapter_trains_and_in_float32(llama: Path) -> None:
    adapter = AdapterModel(
        load_base_model(str(llama), device="cpu", dtype="bfloat16"), spec_of(lora_targets=("q_proj",))
    )
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert len(adapter.parameters()) == len(adapter.manifest().tensors) == 4
    assert adapter.manifest().parsed_config()["target_modules"] == ["q_proj"]
    # The base model keeps its type.
    assert {parameter.dtype for parameter in adapter.module.parameters()} == {torch.float32, torch.bfloat16}


def test_an_unknown_target_names_the_modules_there_are(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"'c_attn'.*down_proj.*v_proj"):
        AdapterModel(load_base_model(str(llama), device="cpu"), spec_of(lora_targets=("c_attn",)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_and_save_round_trip_in_every_wire_type(tmp_path: Path, llama: Path, dtype: str) -> None:
    adapter = AdapterModel(load_base_model(str(llama), device="cpu"), spec_of(wire_dtype=dtype))
    adapter.load(random_adapter(adapter, tmp_path / "random"))
    first = adapter.save(tmp_path / "first")
    adapter.load(tmp_path / "first")
    assert adapter.save(tmp_path / "second") == first
    with AdapterReader(tmp_path / "first", adapter.manifest()) as reader:
        tensor = adapter.manifest().tensors[0]
        assert torch.from_numpy(reader.tensor(tensor)).allclose(
            torch.from_numpy(tensor.initial_value(3) + 0.05), atol=4e-3
        )


def test_an_adapter_for_another_model_does_not_fit(tmp_path: Path, llama: Path) -> None:
    small = AdapterModel(load_base_model(str(llama), device="cpu"), spec_of())
    wide = make_model(tmp_path / "wide", hidden=48)
    adapter = AdapterModel(load_base_model(str(wide), device="cpu"), spec_of())
    small.save(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shape"):
        adapter.load(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(small.manifest().config)
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)
    edit_json(tmp_path / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)
    for unfit in ("{", '{"peft_type": "NONE_OF_PEFTS"}', "{}", "[]"):
        (tmp_path / "adapter_config.json").write_text(unfit)
        with pytest.raises(ModelError, match="does not describe an adapter"):
            InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """No connection is made; what tried to is in the list."""
    calls: list[object] = []

    def refuse(*arguments: object) -> None:
        calls.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


CONFIGS: list[PeftConfig] = [
    IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.peft_type.value)
def test_a_folder_of_any_peft_method_computes_what_peft_computes(
    tmp_path: Path, llama: Path, no_network: list[object], config: PeftConfig
) -> None:
    folder = tmp_path / "adapter"
    theirs: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    theirs.save_pretrained(folder, save_embedding_layers=False)
    base = load_base_model(str(llama), device="cpu")
    plain = logits_of(base.model)
    ours = InferenceModel.with_adapter(base, folder)
    assert torch.equal(logits_of(ours.module), logits_of(theirs))
    assert not torch.allclose(logits_of(theirs)[:, -IDS.shape[1] :], plain, atol=1e-3)
    assert not no_network


def test_a_folder_without_a_configuration_or_with_others_behind_it_asks_nobody(
    tmp_path: Path, llama: Path, no_network: list[object]
) -> None:
    base = load_base_model(str(llama), device="cpu")
    with pytest.raises(ModelError, match="does not describe an adapter"):
        InferenceModel.with_adapter(base, tmp_path)
    mixture = {"peft_type": "XLORA", "task_type": "CAUSAL_LM", "hidden_size": 32, "adapters": {"a": "org/adapter"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(mixture))
    with pytest.raises(ModelError, match="X-LoRA"):
        InferenceModel.with_adapter(base, tmp_path)
    prompt = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Answer:",
        "tokenizer_name_or_path": "org/model",
        "inference_mode": False,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(prompt))
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(base, tmp_path)
    assert not no_network
