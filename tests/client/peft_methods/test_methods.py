"""PEFT methods: another one than LoRA needs nothing but its configuration and how its tensors start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from fedhds.spec import RunSpec
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest, Initial
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.models.loading import BaseModel, load_base_model
from fedhds_client.peft_methods import PEFT_METHODS, PeftMethod
from tests.support.tiny import make_model


class Ia3(PeftMethod):
    """(IA)3: vectors of ones that scale keys, values and the inner activations."""

    def config(self, spec: RunSpec, base: BaseModel) -> PeftConfig:
        return IA3Config(
            target_modules=["v_proj", "k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )

    def initial(self, spec: RunSpec, role: str, shape: tuple[int, ...]) -> Initial:
        return Initial.ones()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def manifest(llama: Path) -> AdapterManifest:
    """Of the method above on it."""
    spec = RunSpec.of(model="org/base", rounds=1)
    base = load_base_model(str(llama), device="cpu")
    return Ia3().manifest(spec, get_peft_model(base.model, Ia3().config(spec, base)))


def test_the_manifest_of_ia3_travels(manifest: AdapterManifest) -> None:
    assert AdapterManifest.from_proto(manifest.to_proto()) == manifest
    assert len(manifest.tensors) == 2 * 3
    assert {(tensor.role, tensor.initial, tensor.scale_axis) for tensor in manifest.tensors} == {
        ("ia3_l", Initial.ones(), None)
    }
    config = manifest.parsed_config()
    assert config["peft_type"] == "IA3"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]


def test_peft_loads_an_ia3_adapter_that_was_written_tensor_by_tensor(
    tmp_path: Path, llama: Path, manifest: AdapterManifest
) -> None:
    ids = torch.tensor([[5, 9, 40]])
    plain: Any = AutoModelForCausalLM.from_pretrained(llama)

    def loaded() -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(llama)
        return PeftModel.from_pretrained(model, str(tmp_path)).eval()

    (tmp_path / "adapter_config.json").write_text(manifest.config)
    path = tmp_path / "adapter_model.safetensors"
    write_adapter(path, manifest, lambda spec: spec.initial_value(1), "float32")
    with torch.no_grad():
        # Ones change nothing.
        assert torch.equal(loaded()(input_ids=ids).logits, plain(input_ids=ids).logits)
        write_adapter(path, manifest, lambda spec: spec.initial_value(1) * np.float32(0.5), "float32")
        assert not torch.allclose(loaded()(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)
    state = get_peft_model_state_dict(loaded(), save_embedding_layers=False)
    with AdapterReader(path, manifest) as reader:
        assert state.keys() == {spec.name for spec in manifest.tensors}
        assert all(np.array_equal(state[spec.name].numpy(), reader.tensor(spec)) for spec in manifest.tensors)


@pytest.mark.parametrize("codec", CODECS)
def test_an_update_of_ia3_goes_through_every_codec(tmp_path: Path, manifest: AdapterManifest, codec: str) -> None:
    CODECS[codec].write(tmp_path / "update", manifest, lambda spec: spec.initial_value(1) * np.float32(0.5))
    with AdapterReader(tmp_path / "update", manifest, differences=True) as reader:
        assert all(np.allclose(reader.tensor(spec), 0.5) for spec in manifest.tensors)


def test_roles_are_the_last_part_of_peft_names() -> None:
    method, spec = PEFT_METHODS["lora"], RunSpec.of(model="org/base", rounds=1)
    for name, role in (
        ("base_model.model.q_proj.lora_A.weight", "lora_A"),
        ("base_model.model.q_proj.ia3_l", "ia3_l"),
        ("base_model.model.q_proj.bias", "bias"),
        ("prompt_embeddings", "prompt_embeddings"),
    ):
        assert method.role(spec, name) == role
