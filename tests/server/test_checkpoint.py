"""The checkpoint: a folder that PEFT loads, a model card that the hub reads, and never half a version."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig

from fedhds.errors import StorageError
from fedhds.spec import RunSpec
from fedhds.tensors.manifest import StopToken
from fedhds.tensors.safetensors import write_adapter
from fedhds_client.export.adapter_folder import AdapterFolder
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_server.aggregation import AGGREGATORS
from fedhds_server.aggregation.fedavg import FedAvg
from fedhds_server.storage.checkpoint import write_checkpoint
from fedhds_server.storage.model_card import CardFacts, model_card
from tests.support.manifests import lora_manifest
from tests.support.tiny import make_model

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json"]
FACTS = CardFacts(
    rounds=3,
    sites=2,
    rows=2000,
    samples=30,
    fingerprint={"weights": "aa", "config": "bb"},
    version="1.2.3",
    evaluations={0: (40, {"loss": 2.5, "rouge_l": 0.125}), 3: (40, {"loss": 1.25, "rouge_l": 0.5})},
)


def spec(**fields: Any) -> RunSpec:
    return RunSpec.of(**{"model": "org/base", "rounds": 5} | fields)


def write(folder: Path, number: int) -> None:
    """Writes a checkpoint whose every file tells its number."""
    adapter = folder / "adapter"
    write_adapter(adapter, MANIFEST, lambda tensor: np.full(tensor.shape, number, np.float32), "float32")
    write_checkpoint(folder, adapter, json.dumps({"r": number}), f"card {number}", f"ends {number}")


def number_of(folder: Path) -> int:
    """The number that all files of a checkpoint agree on."""
    checkpoint = folder / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES
    number = int(json.loads((checkpoint / "adapter_config.json").read_text())["r"])
    assert (checkpoint / "README.md").read_text() == f"card {number}"
    assert (checkpoint / "generation_config.json").read_text() == f"ends {number}"
    expected = folder / "expected"
    write_adapter(expected, MANIFEST, lambda tensor: np.full(tensor.shape, number, np.float32), "float32")
    assert (checkpoint / "adapter_model.safetensors").read_bytes() == expected.read_bytes()
    return number


# The folder.


def test_peft_loads_the_checkpoint_with_the_runs_values(tmp_path: Path) -> None:
    model = str(make_model(tmp_path / "model"))
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[5, 9, 40]])
    with torch.no_grad():
        plain = base(input_ids=ids).logits
    run = spec(model=model, lora_rank=3, lora_alpha=6.0, lora_dropout=0.5, lora_targets=("q_proj", "up_proj"))
    manifest = AdapterModel(load_base_model(model, device="cpu"), run).manifest()
    values = {tensor.name: tensor.initial_value(1) + np.float32(0.1) for tensor in manifest.tensors}
    write_adapter(tmp_path / "adapter", manifest, lambda tensor: values[tensor.name], "float32")
    write_checkpoint(tmp_path, tmp_path / "adapter", manifest.config, "card")

    fresh: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded: Any = PeftModel.from_pretrained(fresh, str(tmp_path / "checkpoint"))
    found = get_peft_model_state_dict(loaded)
    assert {name: at.tolist() for name, at in found.items()} == {name: at.tolist() for name, at in values.items()}
    assert loaded.peft_config["default"].base_model_name_or_path == model
    assert {at.scaling["default"] for at in loaded.modules() if hasattr(at, "lora_A")} == {2.0}
    with torch.no_grad():
        # Loaded for inference: no dropout, and the adapter counts.
        assert torch.equal(loaded(input_ids=ids).logits, loaded(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, plain, atol=1e-2)


def test_a_checkpoint_is_replaced_and_the_one_before_removed(tmp_path: Path) -> None:
    for number in range(1, 6):
        write(tmp_path, number)
        assert number_of(tmp_path) == number
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    assert not (tmp_path / "checkpoint.partial").is_symlink()


def test_a_run_folder_can_be_moved_with_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", 1)
    (tmp_path / "old").rename(tmp_path / "new")
    assert number_of(tmp_path / "new") == 1
    write(tmp_path / "new", 2)
    assert number_of(tmp_path / "new") == 2


def crashed_at(step: int, act: Callable[[], None]) -> bool:
    """Runs `act` in a child that dies before the step number `step` on files or folders; whether it got so far."""
    steps = count()

    def audit(event: str, _: tuple[object, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.")) and next(steps) == step:
            os._exit(9)

    child = os.fork()
    if not child:
        try:
            sys.addaudithook(audit)
            act()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 9


# From Python 3.12 on, forking a process with threads warns; the child does nothing but write files.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("earlier", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (0, 2))])
def test_a_crash_at_any_step_leaves_a_whole_version_and_the_next_write_repairs_the_rest(
    tmp_path: Path, earlier: int
) -> None:
    seen = []
    for step in count():
        folder = tmp_path / str(step)
        folder.mkdir()
        for number in range(1, earlier + 1):
            write(folder, number)
        crashed = crashed_at(step, partial(write, folder, earlier + 1))
        seen.append(number_of(folder) if (folder / "checkpoint").is_symlink() else 0)
        write(folder, earlier + 2)
        assert number_of(folder) == earlier + 2
        assert len(list((folder / "checkpoints").iterdir())) == 1
        if not crashed:
            break
    # The version before up to some step, from then on the new one.
    assert seen == sorted(seen)
    assert set(seen) == {earlier, earlier + 1}


def test_a_failed_write_is_a_named_error_and_the_version_before_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    with pytest.raises(StorageError, match=r"cannot write the checkpoint to .*No such file"):
        write_checkpoint(tmp_path, tmp_path / "vanished", "{}", "card")
    assert number_of(tmp_path) == 1
    with pytest.raises(StorageError, match="absent"):
        write_checkpoint(tmp_path / "absent", tmp_path / "adapter", "{}", "card")


# The model card.


def card(facts: CardFacts = FACTS, **fields: Any) -> str:
    return model_card(spec(**fields), facts)


def front_matter(text: str) -> dict[str, Any]:
    """What the Hugging Face hub reads of a card."""
    data: dict[str, Any] = ModelCard(text).data.to_dict()
    return data


def test_the_hub_reads_the_cards_front_matter() -> None:
    text = card(model_license="apache-2.0")
    front = yaml.safe_load(text.split("---")[1])
    assert front.pop("model-index")
    assert front == {
        "base_model": "org/base",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "prompt_format": "auto",
        "tags": ["fedhds", "federated-learning", "instruction-tuning", "lora"],
    }
    data: Any = ModelCard(text).data
    assert data.library_name == "peft"
    assert {(result.metric_type, result.metric_value) for result in data.eval_results or ()} == {
        ("loss", 1.25),
        ("rouge_l", 0.5),
    }
    assert {result.task_type for result in data.eval_results or ()} == {"text-generation"}
    # What the hub's own client makes of it is the same.
    assert yaml.safe_load(str(data))["model-index"] == yaml.safe_load(text.split("---")[1])["model-index"]


def test_scores_of_another_round_are_not_those_of_the_adapter() -> None:
    for facts in (
        replace(FACTS, rounds=4),
        replace(FACTS, rounds=0),
        replace(FACTS, evaluations={3: (40, {"loss": float("inf")})}),
    ):
        data: Any = ModelCard(card(facts)).data
        assert data.eval_results is None


def test_export_and_chat_read_the_prompt_format_from_the_card(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", MANIFEST, lambda tensor: np.zeros(tensor.shape, np.float32), "float32")
    write_checkpoint(tmp_path, tmp_path / "a", "{}", card(prompt_format="alpaca"))
    assert AdapterFolder.open(tmp_path / "checkpoint").prompt_format() == "alpaca"
    (tmp_path / "checkpoint" / "README.md").write_text("# No card of fedhds")
    assert AdapterFolder.open(tmp_path / "checkpoint").prompt_format() == "auto"


@pytest.mark.parametrize("model", ["/srv/models/base", "base", "./base", "../base", "a/b/c", "org/", "C:\\models"])
def test_a_local_model_is_not_taken_for_one_of_the_hub(model: str) -> None:
    text = card(model=model)
    assert "base_model" not in front_matter(text)
    assert f"An adapter for `{model}`" in text


@pytest.mark.parametrize(("license", "expected"), [("not declared", "other"), ("no", "no"), ("a: b # c", "other")])
def test_licenses_stand_in_the_card_as_declared(license: str, expected: str) -> None:
    text = card(model_license=license, data_license="cc-by-sa-3.0")
    front = front_matter(text)
    assert front["license"] == expected
    # The hub takes identifiers only; other words stand beside it.
    assert front.get("license_name") == (license if license == "a: b # c" else None)
    assert f"- base model: {license}\n- data: cc-by-sa-3.0" in text


def test_the_card_tells_how_the_adapter_was_made() -> None:
    text = card(
        selection_budget="1.5%",
        selection_schedule="per-round",
        cohort_fraction=0.25,
        lora_rank=4,
        lora_alpha=12,
        lora_targets=("q_proj", "v_proj"),
        learning_rate=0.001,
        server_optimizer="momentum",
        seed=7,
    )
    for line in (
        "tuned with fedhds 1.2.3 on instruction data of\n2 sites.",
        "| rounds | 3 of 5, cohort fraction 0.25 |",
        "| selection | fedhds-aligned, per-round, budget 1.5% |",
        "| rows trained on | 30 of 2000 (1.5%) |",
        "| PEFT method | lora, rank 4, alpha 12, dropout 0.05, targets q_proj, v_proj |",
        "| training | Adam, learning rate 0.001, constant schedule, batch 4, 1 local epoch, rows up to 1024 tokens |",
        "| aggregation | FedAvg: the mean of each tensor, weighted by rows |",
        "| server optimizer | momentum: with momentum over rounds (FedAvgM) |",
        "| seed | 7 |",
        "| SHA-256 of the base model's config | `bb` |\n| SHA-256 of the base model's weights | `aa` |",
        "format `auto`",
    ):
        assert line in text


def test_the_card_and_the_folder_say_what_ends_an_answer(tmp_path: Path) -> None:
    manifest = replace(MANIFEST, stop_tokens=(StopToken(9, "<|im_end|>"), StopToken(2, "")))
    card = model_card(spec(), replace(FACTS, stop_tokens=manifest.stop_tokens))
    assert "end with the token `<|im_end|>` (9). Stop generation there, or at 2:" in card
    assert "\nmodel.generation_config.eos_token_id = [9, 2]\n" in card
    write_adapter(tmp_path / "a", MANIFEST, lambda tensor: np.zeros(tensor.shape, np.float32), "float32")
    write_checkpoint(tmp_path, tmp_path / "a", "{}", card, manifest.generation_config)
    assert GenerationConfig.from_pretrained(tmp_path / "checkpoint").eos_token_id == [9, 2]
    # Sites of an earlier version do not say it.
    assert "end with the token" not in model_card(spec(), FACTS)
    write_checkpoint(tmp_path, tmp_path / "a", "{}", card)
    assert not (tmp_path / "checkpoint" / "generation_config.json").exists()


def test_the_card_tells_what_was_measured() -> None:
    assert (
        "| round | rows | loss (nats per response token) | Rouge-L F1 |\n"
        "| --- | --- | --- | --- |\n"
        "| before | 40 | 2.5000 | 0.1250 |\n"
        "| 3 | 40 | 1.2500 | 0.5000 |\n"
    ) in card()


def test_the_card_has_a_column_for_every_metric_and_gaps_where_one_was_not_measured() -> None:
    evaluations = {0: (4, {"loss": 1.0}), 2: (4, {"loss": 0.5, "exact_match": 0.25})}
    text = card(replace(FACTS, evaluations=evaluations))
    assert (
        "| round | rows | exact_match | loss (nats per response token) |\n"
        "| --- | --- | --- | --- |\n"
        "| before | 4 |  | 1.0000 |\n"
        "| 2 | 4 | 0.2500 | 0.5000 |\n"
    ) in text


def test_a_run_without_rows_or_evaluators_has_a_card_too() -> None:
    text = card(CardFacts(rounds=0, sites=0, rows=0, samples=0, fingerprint={}, version="1", evaluations={}))
    assert "| rows trained on | 0 of 0 (none) |" in text
    assert "No site evaluated." in text
    assert "SHA-256" not in text


CENTROIDS_NOISED = (
    "clipped to L2 norm 0.5 and noised (Gaussian, noise multiplier 1.25); every site's own ledger states the "
    "client-level epsilon at delta 1e-06"
)
CENTROIDS_PLAIN = "Released cluster centroids carried no noise: no differential-privacy guarantee is claimed for them."


@pytest.mark.parametrize(
    ("fields", "said", "unsaid"),
    [
        (
            {"selection_clip_norm": 0.5, "selection_noise_multiplier": 1.25, "selection_delta": 1e-6},
            [CENTROIDS_NOISED],
            ["centroids carried no"],
        ),
        (
            {"selection_clip_norm": 0.5},
            [CENTROIDS_PLAIN, "they sent adapter tensors and cluster centroids."],
            ["noise multiplier"],
        ),
        (
            {"selection_strategy": "federated-kmeans", "selection_clip_norm": 1.0, "selection_noise_multiplier": 1.25},
            [
                "Rows' features were clipped to L2 norm 1 and their sums and counts noised",
                "states the example-level epsilon at delta 1e-05",
            ],
            ["centroids", "client-level"],
        ),
        (
            {"selection_strategy": "federated-kmeans"},
            [
                "Released sums and counts over clusters of features carried no noise",
                "adapter tensors and sums and counts",
            ],
            ["centroids"],
        ),
        ({"selection_strategy": "random"}, ["they sent adapter tensors."], ["centroids"]),
        ({"selection_strategy": "full"}, ["they sent adapter tensors."], ["centroids"]),
    ],
)
def test_the_card_claims_no_more_privacy_than_there_is(
    fields: dict[str, Any], said: list[str], unsaid: list[str]
) -> None:
    text = card(**fields)
    for words in [*said, "Adapter updates carried no noise: no differential-privacy guarantee is claimed"]:
        assert words in text
    for words in unsaid:
        assert words not in text


@pytest.mark.parametrize("model", ["org/base", '/srv/it\'s "here"/base', "C:\\new\\base"])
def test_the_cards_example_is_python_that_names_the_model(model: str) -> None:
    example = card(model=model).split("```python\n")[1].split("```")[0]
    assert model in compile(example, "card", "exec").co_consts


def test_weights_are_claimed_only_where_they_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the mean of each tensor, weighted by rows |" in card()
    assert "weighted equally |" in card(weight_by="equal")
    robust = card(robust_rule="geometric-median", min_sites=5)
    assert "all parties count the same |" in robust
    assert "weighted" not in robust.split("| aggregation |")[1].split("\n")[0]

    class Own(FedAvg):
        description = "An own mean"

        def weights(self, *_: Any) -> Any:
            raise AssertionError

    monkeypatch.setitem(AGGREGATORS, "fedavg", Own())
    assert "| aggregation | An own mean |" in card()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epsilon": 8.0}, "costs at most epsilon 8 at delta 1e-05"),
        ({"dp_noise_multiplier": 1.5}, "noise multiplier 1.5; every site's own ledger states the example-level"),
    ],
)
def test_the_card_says_what_noise_in_training_promises(fields: dict[str, Any], said: str) -> None:
    text = card(selection_strategy="random", **fields)
    assert said in text
    assert "carried no noise" not in text.split("## Privacy")[1].split("##")[0]
