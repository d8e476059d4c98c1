"""Models with one property each that stopped a site, from their folders to a step of training."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
)

from fedhds.errors import ModelError
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.features.extraction import extract_features
from fedhds_client.features.projection import FeatureSpace
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.fingerprint import fingerprint
from fedhds_client.models.loading import load_base_model
from fedhds_client.models.packages import missing_package
from fedhds_client.training.loop import train
from tests.support.architectures import tiny_config, tiny_model
from tests.support.model_folders import copy_model, edit_json, spec_of
from tests.support.tiny import make_model, write_rows


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_model(tmp_path_factory.mktemp("llama"))


def _save(model: Any, tokenizer: Path, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def _site(folder: Path, rows: Path) -> tuple[str, list[str]]:
    """What a site does: loads, registers, trains; the fingerprint of the configuration and the adapter's tensors."""
    base = load_base_model(str(folder), device="cpu")
    prompter = Prompter(base.tokenizer, max_length=64)
    spec = spec_of(folder, local_epochs=1, batch_size=2)
    adapter = AdapterModel(base, spec)
    proof = fingerprint(base, prompter.fingerprint)
    proof.SerializeToString()
    manifest = adapter.manifest()
    assert type(manifest).from_proto(manifest.to_proto()) == manifest
    before = [parameter.clone() for parameter in adapter.parameters()]
    with Shard.open(rows) as shard:
        outcome = train(
            adapter, shard, range(4), prompter, spec.training, seed=1, progress=lambda _: None, cancelled=lambda: False
        )
    assert outcome.steps == 2
    # B starts at zero and A's gradient there, too: every B has moved.
    moved = [not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True)]
    assert sum(moved) >= len(moved) / 2
    return proof.config, [tensor.name for tensor in manifest.tensors]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four rows of different lengths."""
    return write_rows(tmp_path / "rows.jsonl", {"cats": 2, "hippopotamuses": 2})


def _pad_beyond(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)


def test_a_padding_token_beyond_the_embedding_is_replaced_and_said_once(
    tmp_path: Path, llama: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    _pad_beyond(folder)
    with caplog.at_level(logging.INFO, logger="fedhds_client"):
        _site(folder, rows)
    assert [record.getMessage() for record in caplog.records if "pads with" in record.getMessage()] == [
        f"the tokenizer of {folder} has the padding token 259, and the model has 259 embeddings; it pads with </s>"
    ]


def test_an_end_of_text_beyond_the_embedding_is_refused(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"end-of-text token of .* has the id 259, but the model has only 259 embeddings"
    ):
        load_base_model(str(folder), device="cpu")


def test_numbers_as_keys_of_a_configuration(tmp_path: Path, llama: Path, rows: Path) -> None:
    prints = {_site(llama, rows)[0]}
    for labels in ({"0": "LABEL_0"}, {"0": "yes", "1": "no", "2": "perhaps"}):
        folder = copy_model(llama, tmp_path / str(len(labels)))
        edit_json(folder / "config.json", id2label=labels, label2id={label: int(key) for key, label in labels.items()})
        prints.add(_site(folder, rows)[0])
    assert len(prints) == 3


@pytest.mark.parametrize("architecture", ["mpt", "deepseek_v3", "phimoe", "mamba", "jamba", "gpt_oss"])
def test_an_architecture_from_its_folder_to_a_step(architecture: str, tmp_path: Path, llama: Path, rows: Path) -> None:
    folder = _save(tiny_model(tiny_config(architecture)), llama, tmp_path / "m")
    assert _site(folder, rows) == _site(shutil.copytree(folder, tmp_path / "elsewhere"), rows)


def test_the_longest_row_is_what_the_model_has_positions_for(tmp_path: Path, llama: Path) -> None:
    mpt = _save(tiny_model(tiny_config("mpt")), llama, tmp_path / "mpt")
    assert load_base_model(str(mpt), device="cpu").max_length == 256
    # The limit of a model of text and images stands in its part for text.
    gemma = _save(tiny_model(tiny_config("gemma3")), llama, tmp_path / "gemma")
    assert load_base_model(str(gemma), device="cpu").max_length == 256


SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 66,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    "make", [lambda: RobertaModel(RobertaConfig(**SIZES)), lambda: MPNetModel(MPNetConfig(**SIZES))]
)
def test_an_encoder_that_counts_from_behind_the_padding_takes_its_longest_row(
    make: Callable[[], Any], tmp_path: Path, llama: Path
) -> None:
    base = load_base_model(str(_save(make(), llama, tmp_path / "m")), device="cpu", body_only=True)
    assert base.max_length == 64
    longest = [[7] * 64, [8, 9]]
    features = extract_features(
        base.model, longest.__getitem__, range(2), FeatureSpace(1, 8), pad_id=base.tokenizer.pad_token_id, batch_size=2
    )
    assert features.values.shape == (2, 8)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_classifier_gives_the_features_of_its_encoder(labels: int, tmp_path: Path, llama: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(**SIZES, id2label={number: str(number) for number in range(labels)})
    classifier = BertForSequenceClassification(config).eval()
    base = load_base_model(str(_save(classifier, llama, tmp_path / "m")), device="cpu", body_only=True)
    fingerprint(base, "template")
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        theirs = classifier.bert(input_ids=ids).last_hidden_state
        assert torch.equal(base.model(input_ids=ids).last_hidden_state, theirs)


def test_an_encoder_decoder_is_refused_by_name(tmp_path: Path, llama: Path) -> None:
    config = tiny_config("bart")
    folder = _save(tiny_model(config), llama, tmp_path / "m")
    edit_json(folder / "config.json", is_encoder_decoder=True)
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(bart\); choose a causal language model"):
        load_base_model(str(folder), device="cpu")


def test_a_model_newer_than_transformers_is_named(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    edit_json(folder / "config.json", model_type="llama_9")
    with pytest.raises(
        ModelError, match=r"is a llama_9 model, which transformers 5.* does not know; install a newer one"
    ):
        load_base_model(str(folder), device="cpu")


def test_code_of_a_tokenizer_is_not_run_either(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    edit_json(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["own.Tokenizer", None]},
        tokenizer_class="OwnTokenizer",
    )
    (folder / "own.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ModelError, match="code of its own, which is never run"):
        load_base_model(str(folder), device="cpu")


def test_the_missing_package_is_named() -> None:
    for text, package in (
        ("Model requires the nothere library but it was not found in your environment.", "nothere"),
        ("Using `nothere` 4-bit quantization requires nothere: `pip install -U nothere>=0.46.1`", "nothere"),
        ("Loading a quantized model requires optimum (`pip install not-here`)", "not-here"),
        ("No module named 'nothere.kernels'", "nothere"),
    ):
        assert missing_package(ImportError(text)) == package
    # What is installed is not the cause, whatever the text says.
    for text in (
        "requires the protobuf library",
        "pip install torch",
        "the file is damaged",
        "No module named 'torch'",
    ):
        assert missing_package(ImportError(text)) is None
    wrapped = ValueError("it failed")
    wrapped.__cause__ = ImportError("No module named 'nothere'")
    assert missing_package(wrapped) == "nothere"


def test_a_quantized_model_without_its_package_is_not_called_damaged(tmp_path: Path, llama: Path) -> None:
    folder = copy_model(llama, tmp_path / "m")
    edit_json(folder / "config.json", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ModelError, match="needs the Python package aqlm; install it") as raised:
        load_base_model(str(folder), device="cpu")
    assert "damaged" not in str(raised.value)


def _sentencepiece(folder: Path) -> None:
    """Replaces the tokenizer by a file of SentencePiece alone, as Llama 2 came."""
    import sentencepiece

    for file in folder.glob("*token*"):
        file.unlink()
    lines = ["the quick brown fox jumps over the lazy dog"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    )


def _tiktoken(folder: Path) -> None:
    """Replaces the tokenizer by a file of tiktoken alone, as Llama 3 came."""
    for file in folder.glob("*token*"):
        file.unlink()
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )


@pytest.mark.parametrize("change", [_sentencepiece, _tiktoken])
def test_tokenizers_of_other_libraries_work(
    change: Callable[[Path], None], tmp_path: Path, llama: Path, rows: Path
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    change(folder)
    _site(folder, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "package"), [(_sentencepiece, "sentencepiece"), (_tiktoken, "tiktoken")])
def test_a_tokenizer_whose_library_is_missing_names_it(
    change: Callable[[Path], None], package: str, tmp_path: Path, llama: Path
) -> None:
    folder = copy_model(llama, tmp_path / "m")
    change(folder)
    # In a process of its own: transformers remembers what is installed.
    code = f"""
import importlib.metadata, importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
find_spec, distribution, version = importlib.util.find_spec, importlib.metadata.distribution, importlib.metadata.version
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find_spec(name, *rest)
def absent(known):
    def ask(name):
        if name == {package!r}:
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)
    return ask
importlib.metadata.distribution, importlib.metadata.version = absent(distribution), absent(version)
from fedhds.errors import ModelError
from fedhds_client.models.loading import load_base_model
try:
    load_base_model({str(folder)!r}, device="cpu")
except ModelError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"needs the Python package {package}; install it" in done.stdout, done.stdout + done.stderr[-800:]
