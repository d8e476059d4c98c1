"""Base models: what goes wrong at loading is a clear error, and nothing is fetched for a local folder."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fedhds.errors import ModelError
from fedhds_client.models import precision
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.fingerprint import fingerprint
from fedhds_client.models.loading import load_base_model
from tests.support.model_folders import copy_model, edit_json, spec_of
from tests.support.shared import shared


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
    AdapterModel(base, spec_of())
    assert not calls
    assert (base.model.dtype, base.max_length, base.device.type) == (torch.float32, 512, "cpu")


def test_half_precision_weights_are_upcast_on_a_cpu_unless_asked_for(tmp_path: Path, llama: Path) -> None:
    half = load_base_model(str(llama), device="cpu").model.to(torch.bfloat16)
    half.save_pretrained(copy_model(llama, tmp_path / "half"))
    base = load_base_model(str(tmp_path / "half"), device="cpu")
    assert (base.model.dtype, base.stored_dtype) == (torch.float32, torch.bfloat16)
    assert load_base_model(str(tmp_path / "half"), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="int8"):
        load_base_model(str(llama), dtype="int8")


def test_large_models_are_bfloat16_where_the_cpu_multiplies_it_fast(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dtype(name: str = "auto") -> torch.dtype:
        loaded: torch.dtype = load_base_model(str(llama), device="cpu", dtype=name).model.dtype
        return loaded

    monkeypatch.setattr(precision, "cpu_is_fast", lambda: True)
    assert dtype() == torch.float32
    monkeypatch.setattr(precision, "_SMALL", 10_000)
    assert dtype() == torch.bfloat16
    assert dtype("float32") == torch.float32
    monkeypatch.setattr(precision, "cpu_is_fast", lambda: False)
    assert dtype() == torch.float32
    # An adapter on 16-bit weights is float32.
    adapter = AdapterModel(load_base_model(str(llama), device="cpu", dtype="bfloat16"), spec_of())
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


def test_4_bits_need_a_gpu(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"4bit needs a CUDA device.*; use --dtype auto"):
        load_base_model(str(llama), device="cpu", dtype="4bit")
    quantized: object = SimpleNamespace(quantization_config={})
    with pytest.raises(ModelError, match="m is quantized already; use --dtype auto"):
        precision.four_bit("m", torch.device("cuda"), quantized)
    assert precision.four_bit("m", torch.device("cuda"), SimpleNamespace()).load_in_4bit


def test_eos_pads_when_there_is_no_padding_token(tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_model(llama, tmp_path / "m")
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
        (lambda folder: edit_json(folder / "config.json", intermediate_size=70), "shapes differ from config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "unusable config.json"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "t5 model, not a causal"),
        (lambda folder: edit_json(folder / "config.json", architectures=["XForMaskedLM"]), "not a causal"),
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
    spoil(copy_model(llama, tmp_path / "m"))
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


def test_a_pretrained_model() -> None:
    base = load_base_model(str(shared("models/nano-llama")), device="cpu")
    assert (base.max_length, base.stored_dtype, base.model.dtype) == (1024, torch.float16, torch.float32)
    manifest = AdapterModel(base, spec_of()).manifest()
    assert len(manifest.tensors) == 6 * 7 * 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda file: edit_json(file, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, no "),
        (lambda file: edit_json(file, vocab_size=10**12), "vocab_size is 1000000000000"),
        (lambda file: edit_json(file, hidden_size=-1), "unusable config.json"),
        (lambda file: file.write_text("[" * 100_000), "config.json"),
        (lambda file: file.write_text(" " * (5 << 20)), "larger than 4 MiB"),
    ],
    ids=["layers", "vocabulary", "negative", "nested", "large"],
)
def test_a_configuration_of_no_model_is_told_and_not_built(
    llama: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = copy_model(llama, tmp_path / "model")
    damage(folder / "config.json")
    with pytest.raises(ModelError, match=reason):
        load_base_model(str(folder), device="cpu")
