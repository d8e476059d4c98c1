"""Fingerprints: equal for the same model, whatever its files look like, and another for every change of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedhds.v2 import federation_pb2 as pb
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.fingerprint import fingerprint
from fedhds_client.models.loading import BaseModel, load_base_model
from tests.support.model_folders import change_weight, copy_model, edit_json, spec_of
from tests.support.tiny import make_model


def print_of(folder: Path, **options: Any) -> pb.ModelFingerprint:
    return fingerprint(load_base_model(str(folder), device="cpu", **options), "template")


def differing(a: pb.ModelFingerprint, b: pb.ModelFingerprint) -> set[str]:
    return {field for field in ("weights", "config", "tokenizer", "template") if getattr(a, field) != getattr(b, field)}


def test_the_fingerprint_ignores_folder_shards_and_versions(tmp_path: Path, llama: Path) -> None:
    expected = print_of(llama)
    moved = copy_model(llama, tmp_path / "elsewhere")
    edit_json(moved / "config.json", transformers_version="5.0.0", use_cache=False, architectures=None)
    assert print_of(moved) == expected
    assert print_of(llama, dtype="bfloat16") == expected
    model = AutoModelForCausalLM.from_pretrained(llama)
    sharded = copy_model(llama, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert print_of(sharded) == expected


def test_encoding_and_adapters_leave_the_fingerprint_alone(llama: Path) -> None:
    base = load_base_model(str(llama), device="cpu")
    base.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    AdapterModel(base, spec_of())
    assert fingerprint(base, "template") == print_of(llama)


def test_a_pytorch_checkpoint_has_one_fingerprint_whatever_it_computes_in(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    torch.save(load_file(llama / "model.safetensors"), folder / "pytorch_model.bin")
    assert print_of(folder) == print_of(folder, dtype="bfloat16")
    assert differing(print_of(folder), print_of(make_model(tmp_path / "other", seed=1))) == {"weights"}


def _change_tokenizer(folder: Path) -> None:
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(backend))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (change_weight, "weights"),
        (lambda folder: edit_json(folder / "config.json", rms_norm_eps=1e-5), "config"),
        (_change_tokenizer, "tokenizer"),
        (lambda folder: edit_json(folder / "tokenizer_config.json", unk_token="<pad>"), "tokenizer"),
    ],
)
def test_a_change_shows_in_its_own_field_only(
    tmp_path: Path, llama: Path, change: Callable[[Path], None], field: str
) -> None:
    change(copy_model(llama, tmp_path / "changed"))
    assert differing(print_of(llama), print_of(tmp_path / "changed")) == {field}


def test_the_digest_of_weights_is_remembered_until_the_file_changes(tmp_path: Path, llama: Path) -> None:
    folder, state = copy_model(llama, tmp_path / "m"), tmp_path / "state"
    first = print_of(folder, cache_dir=state)
    (remembered,) = (state / "weights").iterdir()
    assert remembered.read_text() == first.weights
    remembered.write_text("0" * 64)
    assert print_of(folder, cache_dir=state).weights == "0" * 64
    change_weight(folder)
    assert print_of(folder, cache_dir=state).weights not in (first.weights, "0" * 64)


def test_tied_llama_and_its_own_head_load(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "untied")
    config = LlamaConfig.from_pretrained(llama, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    base: BaseModel = load_base_model(str(folder), device="cpu")
    assert "lm_head" not in AdapterModel(base, spec_of()).manifest().parsed_config()["target_modules"]
    assert differing(print_of(folder), print_of(llama)) == {"weights", "config"}
