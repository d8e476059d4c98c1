"""Which tokens of a row features look at, what centering takes off, and what they are cached under."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.data.shard import Shard
from fedhds_client.distributed.process_group import ProcessGroup
from fedhds_client.features.projection import signs
from fedhds_client.features.public_rows import PUBLIC_ROWS
from fedhds_client.features.shard_features import ShardFeatures
from tests.support.templates import CHAT
from tests.support.tiny import make_model, write_rows

LAYER = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def shard_features(
    folder: Path, model: Any, *, template: str = "", padding_side: str = "right", **settings: Any
) -> ShardFeatures:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    tokenizer.chat_template = template or None
    spec = RunSpec.of(**{"model": "m", "rounds": 1, "feature_layers": str(LAYER), "feature_dimension": 16, **settings})
    base = SimpleNamespace(model=model, tokenizer=tokenizer, weights="w" * 64)
    adapter = SimpleNamespace(base=base, module=model, load=lambda path: None)
    policy: Any = SimpleNamespace(inference_batch_size=4, device="cpu", state=None)
    loaded: Any = adapter
    return ShardFeatures(policy, spec, loaded, Prompter(tokenizer, max_length=96), ProcessGroup(0, 1))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Any]:
    """A site with rows."""
    (tmp_path / "adapter").write_bytes(b"")
    with Shard.open(write_rows(tmp_path / "rows.jsonl", {"cats": 4, "a longer topic": 3})) as shard:
        yield SimpleNamespace(name="ward", folder=tmp_path, shard=shard)


def states_of(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[LAYER][0].double().numpy()


def projected(vectors: Any) -> Any:
    matrix = signs(seed=42, layer=LAYER, hidden=vectors.shape[1], dimension=16)
    values = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) @ matrix
    return values / np.linalg.norm(values, axis=1, keepdims=True)


# What the template writes before an answer: nothing of its own, a prompt that only a question gets, Alpaca's heading.
TEMPLATES = {
    "generation prompt": CHAT,
    "none": "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}",
    "alpaca": "",
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_prompt_last_is_the_state_that_predicts_the_first_token_of_the_answer(
    own: Any, tmp_path: Path, folder: Path, model: Any, template: str, padding_side: str
) -> None:
    text = TEMPLATES[template]
    features = shard_features(folder, model, template=text, padding_side=padding_side, feature_pooling="prompt-last")
    values = features.extract(own.shard, range(len(own.shard)), tmp_path / "adapter").values
    expected = []
    for number in range(len(own.shard)):
        # The whole row is run; a causal model's state does not depend on what follows.
        encoded = features._prompter.encode(own.shard[number])
        first = encoded.answer_start
        assert encoded.loss[first]
        assert not any(encoded.loss[:first])
        expected.append(states_of(model, encoded.input_ids)[first - 1])
    np.testing.assert_allclose(values, projected(np.stack(expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "prompt-last"])
def test_centering_takes_off_the_mean_over_public_rows(
    own: Any, tmp_path: Path, folder: Path, model: Any, pooling: str
) -> None:
    features = shard_features(folder, model, feature_pooling=pooling, feature_centering="public")
    values = features.extract(own.shard, range(len(own.shard)), tmp_path / "adapter").values

    def pooled(row: Row) -> Any:
        states = states_of(model, features._encode(row))
        return states.mean(axis=0) if pooling == "mean" else states[-1]

    public = [pooled(Row(number, question, "", answer)) for number, (question, answer) in enumerate(PUBLIC_ROWS)]
    rows = np.stack([pooled(own.shard[number]) for number in range(len(own.shard))])
    np.testing.assert_allclose(values, projected(rows - np.mean(public, axis=0)), rtol=1e-3, atol=1e-4)
    # What rows have in common is gone: they are told apart.
    plain = shard_features(folder, model, feature_pooling=pooling)
    before = plain.extract(own.shard, range(len(own.shard)), tmp_path / "adapter").values
    assert (values @ values.T).mean() < (before @ before.T).mean()


def test_the_centers_are_the_same_whatever_the_rows_of_a_site_are(
    own: Any, tmp_path: Path, folder: Path, model: Any
) -> None:
    features = shard_features(folder, model, feature_centering="public")
    whole = features.extract(own.shard, range(len(own.shard)), tmp_path / "adapter").values
    alone = shard_features(folder, model, feature_centering="public")
    one = alone.extract(own.shard, [2], tmp_path / "adapter").values
    np.testing.assert_allclose(one[0], whole[2], rtol=1e-4, atol=1e-5)


def test_features_are_cached_under_all_that_they_depend_on(own: Any, tmp_path: Path, folder: Path, model: Any) -> None:
    adapter = tmp_path / "adapter"
    settings: list[dict[str, Any]] = [
        {},
        {"feature_layers": "middle"},
        {"feature_pooling": "last"},
        {"feature_pooling": "prompt-last"},
        {"feature_centering": "public"},
        {"feature_centering": "public", "template": CHAT},
        {"feature_dimension": 17},
        {"seed": 1},
    ]
    keys = [shard_features(folder, model, **each)._key(adapter) for each in settings]
    assert len(set(keys)) == len(keys)
    control = SimpleNamespace(report=lambda share: None, cancelled=lambda: False)
    features: Any = shard_features(folder, model, feature_pooling="prompt-last", feature_centering="public")
    first = features.of(own, 0, adapter, control).values
    again: Any = shard_features(folder, model, feature_pooling="prompt-last", feature_centering="public")
    again.extract = lambda *_: pytest.fail("features were taken again")
    assert np.array_equal(again.of(own, 0, adapter, control).values, first)
