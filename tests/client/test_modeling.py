"""Base models: what goes wrong at loading, fingerprints, and adapters that PEFT itself reads."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedhds.adapter import AdapterReader, initial_tensor, peft_config, write_adapter
from fedhds.errors import AdapterError, ModelError
from fedhds.runspec import RunSpec
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.modeling import AdapterModel, BaseModel, InferenceModel, fingerprint, load_base_model
from tests.shared import shared
from tests.tiny import make_model

IDS = torch.tensor([[5, 9, 40, 77, 12]])


def _spec(model: object = "m", **fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": str(model), "rounds": 1, "lora_rank": 4} | fields)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


def _other(folder: Path, tokenizer: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    else:
        model = GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=128,
            )
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """One tiny model of each of three architectures."""
    return llama if request.param == "llama" else _other(tmp_path_factory.mktemp("other"), llama, request.param)


def _copy(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def _print(folder: Path, **options: Any) -> pb.ModelFingerprint:
    return fingerprint(load_base_model(str(folder), device="cpu", **options), "template")


def _differing(a: pb.ModelFingerprint, b: pb.ModelFingerprint) -> set[str]:
    return {field for field in ("weights", "config", "tokenizer", "template") if getattr(a, field) != getattr(b, field)}


def _edit_json(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])


def test_a_local_model_loads_in_float32_without_any_network(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def refuse(*arguments: object) -> None:
        calls.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    base = load_base_model(str(llama), revision="ignored", device="cpu")
    fingerprint(base, "template")
    AdapterModel(base, _spec())
    assert not calls
    assert (base.model.dtype, base.max_length, base.device.type) == (torch.float32, 512, "cpu")


def test_half_precision_weights_are_upcast_on_a_cpu_unless_asked_for(tmp_path: Path, llama: Path) -> None:
    half = load_base_model(str(llama), device="cpu").model.to(torch.bfloat16)
    half.save_pretrained(_copy(llama, tmp_path / "half"))
    base = load_base_model(str(tmp_path / "half"), device="cpu")
    assert (base.model.dtype, base.stored_dtype) == (torch.float32, torch.bfloat16)
    assert load_base_model(str(tmp_path / "half"), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int8"):
        load_base_model(str(llama), dtype="int8")


def test_eos_pads_when_there_is_no_padding_token(tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _copy(llama, tmp_path / "m")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.INFO, logger="fedhds_client"):
        assert load_base_model(str(folder), device="cpu").tokenizer.pad_token == "</s>"
    assert "no padding token" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_drop_tokenizer, "no usable tokenizer"),
        (_drop_tensor, "hold no model.layers.1.mlp.up_proj.weight"),
        (_truncate, "missing or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing or damaged"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "no usable tokenizer"),
        (lambda folder: _edit_json(folder / "config.json", intermediate_size=70), "shapes differ from config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "unusable config.json"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "t5 model, not a causal"),
        (lambda folder: _edit_json(folder / "config.json", architectures=["XForMaskedLM"]), "not a causal"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}'
            ),
            "code of its own, which is never run",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter; give the base model"),
    ],
)
def test_an_unusable_model_is_a_clear_error(
    tmp_path: Path, llama: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(_copy(llama, tmp_path / "m"))
    with pytest.raises(ModelError, match=message):
        load_base_model(str(tmp_path / "m"), device="cpu")


def test_a_name_that_is_neither_folder_nor_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_base_model(str(tmp_path / "absent"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="there is no folder nobody/nothing, and no model of that name"):
        load_base_model("nobody/nothing")


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: y")]
)
def test_a_model_that_does_not_fit_into_memory(llama: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ModelError, match="does not fit into memory"):
        load_base_model(str(llama), device="cpu")


def test_the_fingerprint_ignores_folder_shards_and_versions(tmp_path: Path, llama: Path) -> None:
    expected = _print(llama)
    moved = _copy(llama, tmp_path / "elsewhere")
    _edit_json(moved / "config.json", transformers_version="5.0.0", use_cache=False, architectures=None)
    assert _print(moved) == expected
    assert _print(llama, dtype="bfloat16") == expected
    model = AutoModelForCausalLM.from_pretrained(llama)
    sharded = _copy(llama, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert _print(sharded) == expected


def test_encoding_and_adapters_leave_the_fingerprint_alone(llama: Path) -> None:
    base = load_base_model(str(llama), device="cpu")
    base.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    AdapterModel(base, _spec())
    assert fingerprint(base, "template") == _print(llama)


def test_a_pytorch_checkpoint_has_one_fingerprint_whatever_it_computes_in(tmp_path: Path, llama: Path) -> None:
    folder = _copy(llama, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(load_file(llama / "model.safetensors"), folder / "pytorch_model.bin")
    assert _print(folder) == _print(folder, dtype="bfloat16")
    assert _differing(_print(folder), _print(make_model(tmp_path / "other", seed=1))) == {"weights"}


def _change_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] += 1e-6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _change_tokenizer(folder: Path) -> None:
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (_change_weight, "weights"),
        (lambda folder: _edit_json(folder / "config.json", rms_norm_eps=1e-5), "config"),
        (_change_tokenizer, "tokenizer"),
        (lambda folder: _edit_json(folder / "tokenizer_config.json", unk_token="<pad>"), "tokenizer"),
    ],
)
def test_a_change_shows_in_its_own_field_only(
    tmp_path: Path, llama: Path, change: Callable[[Path], None], field: str
) -> None:
    change(_copy(llama, tmp_path / "changed"))
    assert _differing(_print(llama), _print(tmp_path / "changed")) == {field}


def test_the_digest_of_weights_is_remembered_until_the_file_changes(tmp_path: Path, llama: Path) -> None:
    folder, state = _copy(llama, tmp_path / "m"), tmp_path / "state"
    first = _print(folder, cache_dir=state)
    (remembered,) = (state / "weights").iterdir()
    assert remembered.read_text() == first.weights
    remembered.write_text("0" * 64)
    assert _print(folder, cache_dir=state).weights == "0" * 64
    _change_weight(folder)
    assert _print(folder, cache_dir=state).weights not in (first.weights, "0" * 64)


def _random_adapter(adapter: AdapterModel, path: Path) -> Path:
    # B is zero in a first adapter; any other tensor's draw makes it count.
    write_adapter(path, adapter.manifest(), lambda spec: initial_tensor(spec, 3) + 0.05, "float32")
    return path


def _logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=IDS).logits
    return logits


# What PEFT says where the configuration, which does not know the model, says nothing of GPT-2's transposed weights.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_peft_reads_what_is_saved_and_computes_the_same(tmp_path: Path, any_model: Path) -> None:
    base = load_base_model(str(any_model), device="cpu")
    spec = _spec(any_model)
    plain = _logits(base.model)
    adapter = AdapterModel(base, spec)
    assert torch.equal(_logits(adapter.module), plain)
    adapter.load(_random_adapter(adapter, tmp_path / "random"))
    changed = _logits(adapter.module)
    assert not torch.allclose(changed, plain, atol=1e-2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    artifact = adapter.save(folder / "adapter_model.safetensors")
    assert artifact.size == (folder / "adapter_model.safetensors").stat().st_size
    (folder / "adapter_config.json").write_text(peft_config(spec, adapter.manifest()))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(any_model), folder).eval()
    assert torch.equal(_logits(theirs), changed)
    ours = InferenceModel.with_adapter(load_base_model(str(any_model), device="cpu"), folder)
    assert torch.equal(_logits(ours.module), changed)


def test_the_manifest_is_sorted_resolved_and_of_lora_factors(any_model: Path) -> None:
    base = load_base_model(str(any_model), device="cpu")
    linear = [module for module in base.model.modules() if type(module).__name__ in ("Linear", "Conv1D")]
    manifest = AdapterModel(base, _spec()).manifest()
    assert type(manifest).from_proto(manifest.to_proto()) == manifest
    # A and B for all but the output head.
    assert len(manifest.tensors) == 2 * (len(linear) - 1)
    assert "all-linear" not in manifest.target_modules
    assert list(manifest.target_modules) == sorted(manifest.target_modules)


def test_only_the_adapter_trains_and_in_float32(llama: Path) -> None:
    adapter = AdapterModel(load_base_model(str(llama), device="cpu", dtype="bfloat16"), _spec(lora_targets=("q_proj",)))
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    assert len(adapter.parameters()) == len(adapter.manifest().tensors) == 4
    assert adapter.manifest().target_modules == ("q_proj",)


def test_an_unknown_target_names_the_modules_there_are(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"'c_attn'.*down_proj.*v_proj"):
        AdapterModel(load_base_model(str(llama), device="cpu"), _spec(lora_targets=("c_attn",)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_and_save_round_trip_in_every_wire_type(tmp_path: Path, llama: Path, dtype: str) -> None:
    adapter = AdapterModel(load_base_model(str(llama), device="cpu"), _spec(wire_dtype=dtype))
    adapter.load(_random_adapter(adapter, tmp_path / "random"))
    first = adapter.save(tmp_path / "first")
    adapter.load(tmp_path / "first")
    assert adapter.save(tmp_path / "second") == first
    with AdapterReader(tmp_path / "first", adapter.manifest()) as reader:
        tensor = adapter.manifest().tensors[0]
        assert torch.from_numpy(reader.tensor(tensor)).allclose(
            torch.from_numpy(initial_tensor(tensor, 3) + 0.05), atol=4e-3
        )


def test_an_adapter_for_another_model_does_not_fit(tmp_path: Path, llama: Path) -> None:
    small = AdapterModel(load_base_model(str(llama), device="cpu"), _spec())
    wide = make_model(tmp_path / "wide", hidden=48)
    adapter = AdapterModel(load_base_model(str(wide), device="cpu"), _spec())
    small.save(tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="shape"):
        adapter.load(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(peft_config(_spec(), small.manifest()))
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)
    _edit_json(tmp_path / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(ModelError, match="does not fit"):
        InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)
    for unfit in ("{", '{"peft_type": "IA3"}', "[]"):
        (tmp_path / "adapter_config.json").write_text(unfit)
        with pytest.raises(ModelError, match="does not describe a LoRA adapter"):
            InferenceModel.with_adapter(load_base_model(str(wide), device="cpu"), tmp_path)


def test_tied_llama_and_its_own_head_load(tmp_path: Path, llama: Path) -> None:
    folder = _copy(llama, tmp_path / "untied")
    config = LlamaConfig.from_pretrained(llama, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    base: BaseModel = load_base_model(str(folder), device="cpu")
    assert "lm_head" not in AdapterModel(base, _spec()).manifest().target_modules
    assert _differing(_print(folder), _print(llama)) == {"weights", "config"}


def test_a_pretrained_model() -> None:
    base = load_base_model(str(shared("models/nano-llama")), device="cpu")
    assert (base.max_length, base.stored_dtype, base.model.dtype) == (1024, torch.float16, torch.float32)
    manifest = AdapterModel(base, _spec()).manifest()
    assert len(manifest.tensors) == 6 * 7 * 2
