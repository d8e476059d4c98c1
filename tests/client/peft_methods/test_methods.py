"""PEFT methods, one suite over the registry: what a run does with an adapter works with each of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhds.errors import AdapterError, ModelError, TaskError
from fedhds.spec import PEFT_SPECS, RunSpec
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest, FloatArray, InitialKind, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation.evaluate import evaluate
from fedhds_client.evaluation.generation import generate
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.projection import FeatureSpace
from fedhds_client.models.adapter import AdapterModel, InferenceModel, virtual_tokens_of
from fedhds_client.models.loading import BaseModel, load_base_model
from fedhds_client.peft_methods import PEFT_METHODS
from fedhds_client.peft_methods.lora import row_lengths
from fedhds_client.training.loop import train
from fedhds_server.rpc.adapter_config import check_adapter_config
from tests.support.architectures import tiny_config, tiny_model
from tests.support.model_folders import make_other_model
from tests.support.tiny import make_model, write_rows

# PEFT says it whenever it loads biases for a model that has none.
pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"peft_method": name} for name in PEFT_SPECS},
    "lora": {"lora_rank": 4, "learning_rate": 0.005},
    "rslora": {"use_rslora": True, "lora_rank": 4, "learning_rate": 0.005},
    "dora": {"use_dora": True, "lora_rank": 4, "learning_rate": 0.005},
}
PROMPTS = ("prompt-tuning", "prefix-tuning", "p-tuning")
IDS = torch.tensor([[5, 9, 40, 77, 12]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shard]:
    """Eight rows of two topics."""
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", {"sun": 4, "moon": 4})
    with Shard.open(path) as opened:
        yield opened


def spec_of(name: str, **fields: Any) -> RunSpec:
    return RunSpec.of(**{"model": "org/base", "rounds": 1, "learning_rate": 0.02, **VARIANTS[name], **fields})


def adapter_of(folder: Path, name: str, **fields: Any) -> AdapterModel:
    return AdapterModel(load_base_model(str(folder), device="cpu"), spec_of(name, **fields))


def first_values(adapter: AdapterModel, path: Path) -> Path:
    """The first adapter, as the coordinator makes it of the seed and of what a site sends."""
    given: dict[str, FloatArray] = {}
    if adapter.write_first_values(path):
        with AdapterReader(path, adapter.manifest().from_base) as reader:
            given = {tensor.name: reader.tensor(tensor) for tensor in adapter.manifest().from_base.tensors}
    write_adapter(
        path,
        adapter.manifest(),
        lambda tensor: given[tensor.name] if tensor.name in given else tensor.initial_value(3),
        "float32",
    )
    return path


def moved(adapter: AdapterModel, path: Path) -> Path:
    """An adapter that counts: a little beside the first one."""
    adapter.load(first_values(adapter, path))
    values = adapter.values()
    copies = {tensor.name: values(tensor) + np.float32(0.05) for tensor in adapter.manifest().tensors}
    write_adapter(path, adapter.manifest(), lambda tensor: copies[tensor.name], "float32")
    return path


def logits_of(module: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = module(input_ids=IDS).logits
    return logits[:, -IDS.shape[1] :]


def checkpoint(adapter: AdapterModel, spec: RunSpec, folder: Path) -> Path:
    """The PEFT folder that the coordinator writes of an adapter that counts."""
    file = spec.peft.peft_file(moved(adapter, folder / "run"), adapter.manifest(), folder / "scratch")
    (folder / "adapter_model.safetensors").write_bytes(file.read_bytes())
    (folder / "adapter_config.json").write_text(adapter.manifest().config)
    return folder


def test_every_method_has_both_halves() -> None:
    assert PEFT_METHODS.keys() == PEFT_SPECS.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_manifest_travels_and_is_what_the_coordinator_expects(llama: Path, name: str) -> None:
    spec, manifest = spec_of(name), adapter_of(llama, name).manifest()
    assert AdapterManifest.from_proto(manifest.to_proto()) == manifest
    spec.peft.check_manifest(manifest)
    assert manifest.roles == spec.peft.roles
    config = manifest.parsed_config()
    check_adapter_config(config, spec)
    assert config.items() >= spec.peft.stated.items()
    assert (config["peft_type"], config["base_model_name_or_path"]) == (spec.peft.peft_type, "org/base")
    # The same at every site.
    assert adapter_of(llama, name).manifest() == manifest


@pytest.mark.parametrize("name", VARIANTS)
def test_a_manifest_with_another_tensor_role_shape_start_or_scale_is_refused(llama: Path, name: str) -> None:
    spec, manifest = spec_of(name).peft, adapter_of(llama, name).manifest()
    first = manifest.tensors[0]
    kind = InitialKind.ONES if first.initial.kind is not InitialKind.ONES else InitialKind.ZEROS
    for other in (
        replace(first, name="evil"),
        replace(first, role="evil"),
        replace(first, shape=(*first.shape, 3)),
        replace(first, shape=(1 << 21, *first.shape[1:])),
        replace(first, initial=replace(first.initial, kind=kind)),
        replace(first, scale_axis=len(first.shape) - 1 if first.scale_axis is None else None),
    ):
        with pytest.raises(AdapterError):
            spec.check_manifest(replace(manifest, tensors=(other, *manifest.tensors[1:])))


@pytest.mark.parametrize("name", VARIANTS)
def test_peft_loads_the_checkpoint_and_computes_the_same(tmp_path: Path, llama: Path, name: str) -> None:
    spec, adapter = spec_of(name), adapter_of(llama, name)
    folder = checkpoint(adapter, spec, tmp_path)
    adapter.load(folder / "run")
    ours = logits_of(adapter.module)
    plain: Any = AutoModelForCausalLM.from_pretrained(llama)
    base = logits_of(plain)
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    # P-tuning's virtual tokens come from numpy there, from torch here.
    torch.testing.assert_close(logits_of(theirs), ours, rtol=0, atol=1e-6 if name == "p-tuning" else 0)
    assert not torch.allclose(ours, base, atol=1e-3)
    again = InferenceModel.with_adapter(load_base_model(str(llama), device="cpu"), folder)
    assert again.virtual_tokens == virtual_tokens_of(folder) == (20 if name in PROMPTS else 0)
    assert torch.equal(logits_of(again.module), logits_of(theirs))


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - set(PROMPTS)))
def test_a_first_adapter_changes_nothing(tmp_path: Path, llama: Path, name: str) -> None:
    adapter = adapter_of(llama, name)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(llama))
    adapter.load(first_values(adapter, tmp_path / "first"))
    # DoRA's lengths are those of the weights in bfloat16.
    torch.testing.assert_close(logits_of(adapter.module), plain, rtol=0, atol=1e-3 if name == "dora" else 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_lowers_the_loss_and_goes_on_from_its_file(
    tmp_path: Path, llama: Path, shard: Shard, name: str
) -> None:
    adapter = adapter_of(llama, name)
    spec = spec_of(name, local_epochs=2, batch_size=4)
    prompter = Prompter(adapter.tokenizer, max_length=128)

    def run(start: Path, seed: int, file: Path) -> float:
        adapter.load(start)
        options: dict[str, Any] = {"progress": lambda share: None, "cancelled": lambda: False}
        loss = train(adapter, shard, range(len(shard)), prompter, spec.training, seed=seed, **options).loss
        adapter.save(file)
        return loss

    first = run(first_values(adapter, tmp_path / "start"), 1, tmp_path / "one")
    second = run(tmp_path / "one", 2, tmp_path / "two")
    assert second < first
    with (
        AdapterReader(tmp_path / "two", adapter.manifest()) as new,
        AdapterReader(tmp_path / "start", adapter.manifest()) as old,
    ):
        assert all(not np.array_equal(new.tensor(each), old.tensor(each)) for each in adapter.manifest().tensors)
    # Another process that has the file alone goes on with the same bytes.
    other = adapter_of(llama, name)
    adapter = other
    assert run(tmp_path / "one", 2, tmp_path / "again") == second
    assert (tmp_path / "again").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("name", VARIANTS)
def test_one_role_trains_alone(tmp_path: Path, llama: Path, name: str) -> None:
    adapter = adapter_of(llama, name)
    manifest = adapter.manifest()
    for role in manifest.roles:
        assert len(adapter.parameters(frozenset({role}))) == len(manifest.only(frozenset({role})).tensors)
    assert len(adapter.parameters()) == len(manifest.tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_answers_and_features_depend_on_no_padding(tmp_path: Path, llama: Path, shard: Shard, name: str) -> None:
    adapter = adapter_of(llama, name)
    adapter.load(moved(adapter, tmp_path / "moved"))
    prompter = Prompter(adapter.tokenizer, max_length=128)
    sums = [evaluate(adapter, shard, prompter, max_new_tokens=3, batch_size=size) for size in (1, 8)]
    assert sums[0].means == pytest.approx(sums[1].means, rel=1e-5)
    rows = [shard[row] for row in range(4)]
    alone = [generate(adapter, prompter, [row], 3)[0] for row in rows]
    assert generate(adapter, prompter, rows, 3) == alone
    space = FeatureSpace.of(spec_of(name, feature_dimension=16))
    encoded = [prompter.encode(row).input_ids for row in rows]
    taken = [
        extract_features(adapter.module, lambda row: encoded[row], range(4), space, pad_id=0, batch_size=size).values
        for size in (1, 4)
    ]
    np.testing.assert_allclose(taken[0], taken[1], atol=1e-5)


@pytest.mark.parametrize("codec", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", VARIANTS)
def test_updates_travel_in_short_types(tmp_path: Path, llama: Path, name: str, codec: str) -> None:
    manifest = adapter_of(llama, name).manifest()

    def learned(tensor: TensorSpec) -> FloatArray:
        return np.random.default_rng(len(tensor.name)).normal(0, 0.02, tensor.shape).astype(np.float32)

    CODECS[codec].write(tmp_path / "update", manifest, learned)
    assert (tmp_path / "update").stat().st_size in CODECS[codec].sizes(manifest)
    with AdapterReader(tmp_path / "update", manifest, differences=True) as reader:
        for tensor in manifest.tensors:
            np.testing.assert_allclose(reader.tensor(tensor), learned(tensor), atol=1e-3)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_merges_or_says_that_it_cannot(tmp_path: Path, llama: Path, name: str) -> None:
    folder = checkpoint(adapter_of(llama, name), spec_of(name), tmp_path)
    model = InferenceModel.with_adapter(load_base_model(str(llama), device="cpu"), folder)
    before = logits_of(model.module)
    if name in (*PROMPTS, "beft"):
        with pytest.raises(ModelError, match="merge"):
            model.merged()
        return
    torch.testing.assert_close(logits_of(model.merged()), before, rtol=1e-4, atol=1e-5)


# What follows from the base model.


def test_doras_lengths_are_those_of_the_rows_in_any_layout_and_type() -> None:
    weight = torch.randn(7, 13).to(torch.bfloat16)
    lengths = row_lengths(weight)
    np.testing.assert_allclose(lengths, torch.linalg.norm(weight.float(), dim=1).numpy(), rtol=1e-6)
    assert np.array_equal(row_lengths(weight.float()), lengths)
    assert np.array_equal(row_lengths(weight.float().T.contiguous().T), lengths)
    assert lengths.dtype == np.float32


def test_first_values_from_the_base_model_are_equal_whatever_the_type_it_is_loaded_in(llama: Path) -> None:
    spec = spec_of("dora")
    manifests = [
        AdapterModel(load_base_model(str(llama), device="cpu", dtype=dtype), spec).manifest()
        for dtype in ("float32", "bfloat16")
    ]
    assert manifests[0] == manifests[1]
    magnitudes = manifests[0].from_base.tensors
    assert {tensor.role for tensor in magnitudes} == {"lora_magnitude_vector"}
    assert all(len(tensor.initial.digest) == 64 for tensor in magnitudes)
    with pytest.raises(ValueError, match="follows from the base model"):
        magnitudes[0].initial_value(1)


# What does not work is refused, with its reason.


def base_of(architecture: str, llama: Path, folder: Path) -> BaseModel:
    config = tiny_config(architecture)
    tiny_model(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return load_base_model(str(folder), device="cpu")


def test_biases_on_gpt2_are_refused(tmp_path: Path, llama: Path) -> None:
    base = load_base_model(str(make_other_model(tmp_path / "gpt2", llama, "gpt2")), device="cpu")
    with pytest.raises(ModelError, match=r"torch\.nn\.Linear.*--peft-method"):
        AdapterModel(base, spec_of("beft"))


def test_ia3_on_an_architecture_that_peft_does_not_know_needs_targets(tmp_path: Path, llama: Path) -> None:
    base = base_of("phi3", llama, tmp_path)
    with pytest.raises(ModelError, match=r"phi3 model .*--ia3-targets and --ia3-feedforward"):
        AdapterModel(base, spec_of("ia3"))
    spec = spec_of("ia3", ia3_targets=("qkv_proj", "down_proj"), ia3_feedforward=("down_proj",))
    config = AdapterModel(base, spec).manifest().parsed_config()
    assert (config["target_modules"], config["feedforward_modules"]) == (["down_proj", "qkv_proj"], ["down_proj"])


@pytest.mark.parametrize(("architecture", "name"), [("falcon", "prefix-tuning"), ("mamba", "prompt-tuning")])
def test_prompts_on_models_that_cannot_take_them_are_refused(
    tmp_path: Path, llama: Path, architecture: str, name: str
) -> None:
    base = base_of(architecture, llama, tmp_path)
    with pytest.raises(ModelError, match=r"--peft-method|does not fit"):
        AdapterModel(base, spec_of(name))


def test_doras_lengths_are_not_those_of_a_quantized_model(llama: Path) -> None:
    base = load_base_model(str(llama), device="cpu")
    base.model.hf_quantizer = object()
    with pytest.raises(ModelError, match=r"--dtype, or .* drops --use-dora"):
        AdapterModel(base, spec_of("dora"))


def test_a_prefix_is_not_computed_again(tmp_path: Path, llama: Path, shard: Shard) -> None:
    adapter, spec = adapter_of(llama, "prefix-tuning"), spec_of("prefix-tuning")
    prompter = Prompter(adapter.tokenizer, max_length=128)
    options: dict[str, Any] = {"progress": lambda share: None, "cancelled": lambda: False}
    with pytest.raises(TaskError, match=r"prefix tuning .* without --gradient-checkpointing"):
        train(adapter, shard, [0], prompter, spec.training, seed=1, gradient_checkpointing=True, **options)


def test_virtual_tokens_take_positions_of_rows(llama: Path) -> None:
    adapter = adapter_of(llama, "prompt-tuning", num_virtual_tokens=32)
    assert (adapter.base.max_length, adapter.virtual_tokens, adapter.max_length) == (512, 32, 480)
    assert adapter_of(llama, "lora").max_length == 512
    with pytest.raises(ModelError, match="--num-virtual-tokens"):
        adapter_of(llama, "prefix-tuning", num_virtual_tokens=400)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen2", "qwen3", "gemma3_text", "phi"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_on_every_common_architecture(
    tmp_path: Path, llama: Path, shard: Shard, name: str, architecture: str
) -> None:
    if (architecture, name) == ("gpt2", "beft"):
        pytest.skip("refused, as another test shows")
    base = base_of(architecture, llama, tmp_path / "model")
    spec = spec_of(name, max_length=96, num_virtual_tokens=4) if name in PROMPTS else spec_of(name)
    adapter = AdapterModel(base, spec)
    spec.peft.check_manifest(adapter.manifest())
    (tmp_path / "checkpoint").mkdir()
    folder = checkpoint(adapter, spec, tmp_path / "checkpoint")
    adapter.load(folder / "run")
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(adapter.module), rtol=0, atol=1e-5)
    prompter = Prompter(adapter.tokenizer, max_length=96)
    options: dict[str, Any] = {"progress": lambda share: None, "cancelled": lambda: False}
    losses = [
        train(adapter, shard, range(len(shard)), prompter, spec.training, seed=seed, **options).loss
        for seed in (1, 2, 3)
    ]
    assert losses[2] < losses[0]
    rows = [shard[row] for row in range(4)]
    assert generate(adapter, prompter, rows, 5) == [generate(adapter, prompter, [row], 5)[0] for row in rows]
    assert math.isfinite(losses[2])
