"""`fedhds export`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fedhds.errors import ModelError, UsageError
from fedhds.spec import RunSpec
from fedhds.tensors.safetensors import write_adapter
from fedhds_client.commands.export import export
from fedhds_client.export import merged
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from tests.support.tiny import make_model

app = typer.Typer()
app.command()(export)
IDS = torch.tensor([[5, 9, 40, 77, 12]])


@app.callback()
def _keeps_the_name() -> None:
    """With one command alone, typer would take no name."""


def _fedhds(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_export_copies_the_adapter_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    _fedhds("export", "--adapter", adapter, "--out", tmp_path / "new" / "copy")
    copied = {file.name: file.read_bytes() for file in (tmp_path / "new" / "copy").iterdir()}
    assert set(copied) == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "README.md"}
    assert all((adapter / name).read_bytes() == content for name, content in copied.items())


def _logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("named", [True, False])
def test_export_merges_into_the_type_that_the_base_model_is_stored_in(
    llama: Path, adapter: Path, tmp_path: Path, named: bool
) -> None:
    out = tmp_path / "merged"
    _fedhds("export", "--adapter", adapter, "--out", out, "--format", "merged", *(("--model", llama) if named else ()))
    assert not (out / "adapter_config.json").exists()
    merged: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    plain = _logits(base)
    tuned = _logits(PeftModel.from_pretrained(base, adapter).eval())
    got = _logits(merged.float())
    # Off by no more than the rounding of the merged weights.
    assert (got - tuned).abs().max() < 0.1 * (plain - tuned).abs().max()
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    # Generation with it stops where the adapter's answers end.
    assert merged.generation_config.eos_token_id == [9, 2]


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantized_base_model_is_merged_as_it_computes(bits: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    base, folder, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_model(base, hidden=64)
    plain: Any = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**bits), device_map={"": "cpu"}
    )
    plain.save_pretrained(base)
    adapter = AdapterModel(load_base_model(str(base), device="cpu"), RunSpec.of(model=str(base), rounds=1, lora_rank=4))
    folder.mkdir()
    path = folder / "adapter_model.safetensors"
    write_adapter(path, adapter.manifest(), lambda tensor: tensor.initial_value(3) + 0.05, "float32")
    (folder / "adapter_config.json").write_text(adapter.manifest().config)
    adapter.load(path)
    _fedhds("export", "--adapter", folder, "--out", out, "--format", "merged")
    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    change = (_logits(plain).float() - _logits(adapter.module).float()).abs().max()
    # Eight bits are computed with rounded activations, too.
    assert (_logits(merged) - _logits(adapter.module).float()).abs().max() < 0.2 * change


class _Quantizer:
    """As transformers leaves on a quantized model."""

    def __init__(self, fails: bool) -> None:
        self._fails = fails

    def dequantize(self, model: Any, dtype: torch.dtype) -> Any:
        if self._fails:
            raise NotImplementedError("this method has no way back")
        del model.hf_quantizer
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return model.to(dtype)


@pytest.mark.parametrize("fails", [True, False])
def test_a_quantization_is_undone_before_merging_or_the_cure_is_named(
    fails: bool, llama: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, load = tmp_path / "out", load_base_model

    def quantized(name: str, **options: Any) -> Any:
        base = load(name, **options)
        base.model.hf_quantizer = _Quantizer(fails)
        return base

    monkeypatch.setattr(merged, "load_base_model", quantized)
    if fails:
        with pytest.raises(UsageError, match=r"cannot undo it \(NotImplementedError\); name the model .* with --model"):
            _fedhds("export", "--adapter", adapter, "--out", out, "--format", "merged")
        assert not out.exists()
    else:
        _fedhds("export", "--adapter", adapter, "--out", out, "--format", "merged")
        norm = AutoModelForCausalLM.from_pretrained(out).model.norm.weight
        assert torch.equal(norm, 2 * AutoModelForCausalLM.from_pretrained(llama).model.norm.weight)


def test_an_adapter_that_cannot_be_merged_is_named_as_such(llama: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "prompt", tmp_path / "out"
    base: Any = AutoModelForCausalLM.from_pretrained(llama)
    prompt: Any = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    prompt.save_pretrained(folder, save_embedding_layers=False)
    with pytest.raises(UsageError, match="cannot merge this kind of adapter"):
        _fedhds("export", "--adapter", folder, "--out", out, "--format", "merged")
    assert not out.exists()
    _fedhds("export", "--adapter", folder, "--out", out)
    assert (out / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_bad_input_is_a_persons_mistake(llama: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lacks adapter_config\.json and adapter_model\.safetensors"):
        _fedhds("export", "--adapter", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        _fedhds("export", "--adapter", adapter, "--out", llama)
    with pytest.raises(UsageError, match="not empty"):
        _fedhds("export", "--adapter", adapter, "--out", adapter / "README.md")
    with pytest.raises(UsageError, match="cannot write"):
        _fedhds("export", "--adapter", adapter, "--out", adapter / "README.md" / "below")


def test_an_adapter_that_names_no_base_model_needs_one(adapter: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(adapter, tmp_path / "nameless"), tmp_path / "out"
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    for content in (json.dumps(config), "{", "[]"):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(UsageError, match="name it with --model"):
            _fedhds("export", "--adapter", folder, "--out", out, "--format", "merged")
    assert not out.exists()


def test_a_base_model_that_does_not_fit_leaves_no_folder(adapter: Path, tmp_path: Path) -> None:
    wide = make_model(tmp_path / "wide", hidden=48)
    with pytest.raises(ModelError, match="does not fit"):
        _fedhds("export", "--adapter", adapter, "--out", tmp_path / "out", "--format", "merged", "--model", wide)
    assert not (tmp_path / "out").exists()


def test_gguf_and_ollama_are_folders_that_name_the_base_model(llama: Path, adapter: Path, tmp_path: Path) -> None:
    _fedhds("export", "--adapter", adapter, "--format", "gguf", "--out", tmp_path / "gguf")
    assert [file.name for file in (tmp_path / "gguf").iterdir()] == ["adapter.gguf"]
    _fedhds("export", "--adapter", adapter, "--format", "ollama", "--out", tmp_path / "ollama")
    modelfile = (tmp_path / "ollama" / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM {llama}\n")
    # The model has no chat template: Alpaca's form, which ends with the token that training put behind answers.
    assert "{{ .Content }}\n\n### Response:\n" in modelfile
    assert "{{ .Content }}</s>\n\n### Instruction:\n" in modelfile
    assert (tmp_path / "ollama" / "adapter.gguf").read_bytes() == (tmp_path / "gguf" / "adapter.gguf").read_bytes()


def test_gguf_without_its_package_says_what_to_install(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--format gguf needs pip install 'fedhds\[export\]'"):
        _fedhds("export", "--adapter", adapter, "--format", "gguf", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_check_comes_first_and_writes_nothing_when_it_fails(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "vllm loads" in _fedhds("export", "--adapter", adapter, "--check", "vllm", "--out", out)
    assert out.exists()
    folder = shutil.copytree(adapter, tmp_path / "dora")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    words = ["export", "--adapter", str(folder), "--check", "vllm", "--out", str(tmp_path / "other")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "would not load: vLLM does not compute DoRA; export it with --format merged" in result.stdout
    assert not (tmp_path / "other").exists()


def test_something_must_be_asked_for(adapter: Path) -> None:
    with pytest.raises(UsageError, match="--out: name a folder to write, or give --check or --push-to-hub"):
        _fedhds("export", "--adapter", adapter)


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_uploaded_is_what_was_exported(
    kept: bool, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = {}

    def push(folder: Path, repository: str, *, public: bool) -> str:
        uploaded[repository, public] = {file.name for file in folder.iterdir()}
        return "https://hub.invalid/commit/1"

    monkeypatch.setattr("fedhds_client.export.hub.push", push)
    out = ("--out", tmp_path / "out") if kept else ()
    assert "hub.invalid" in _fedhds("export", "--adapter", adapter, "--push-to-hub", "me/it", *out)
    assert uploaded == {
        ("me/it", False): {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "README.md"}
    }
    assert (tmp_path / "out").exists() == kept


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fedhds_client.commands.export; "
        "print([m for m in ('torch', 'transformers', 'peft', 'gguf', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
