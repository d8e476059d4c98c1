"""A site that trains fewer of LoRA's directions than the run has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedhds.errors import TaskError
from fedhds.spec import RunSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.training.loop import train
from fedhds_server.aggregation import AGGREGATORS, Update, aggregate
from fedhds_server.optimizers import OPTIMIZERS
from tests.support.tiny import make_model, write_rows


def test_sites_of_different_ranks_give_the_best_approximation_of_their_mean(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    spec = RunSpec.of(
        model="m", rounds=1, lora_rank=4, lora_dropout=0.0, aggregator="svd", learning_rate=1e-2, local_epochs=2
    )
    model = AdapterModel(load_base_model(str(folder), device="cpu"), spec)
    manifest = model.manifest()
    first = tmp_path / "first"
    model.save(first)
    shard = Shard.open(write_rows(tmp_path / "rows.jsonl", {"bees": 6}))
    prompter = Prompter(model.tokenizer, max_length=64)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    for number in (1, 2):
        current = first if number == 1 else scratch / "aggregate"
        products = []
        updates = []
        for site, rank in (("a", 1), ("b", 2), ("c", 4)):
            model.load(current)
            model.truncate(rank)
            train(
                model,
                shard,
                range(6),
                prompter,
                spec.training,
                seed=7,
                progress=lambda share: None,
                cancelled=lambda: False,
            )
            path = tmp_path / f"{number}-{site}"
            model.save(path)
            updates.append(Update(site, path, 1 / 3))
            with AdapterReader(path, manifest) as reader:
                tensors = {tensor.name: reader.tensor(tensor) for tensor in manifest.tensors}
            for name, values in tensors.items():
                rest = values[rank:] if ".lora_A." in name else values[:, rank:]
                assert not rest.any()
            products.append(_products(tensors))
            assert all(np.linalg.matrix_rank(product) <= rank for product in products[-1])
            assert any(product.any() for product in products[-1])
        aggregate(
            manifest,
            current,
            updates,
            aggregator=AGGREGATORS["svd"],
            optimizer=OPTIMIZERS["none"],
            spec=spec.aggregation,
            slots={},
            scratch=lambda name, number=number: scratch / name,  # type: ignore[misc]
            round_number=number,
        )
        with AdapterReader(scratch / "aggregate", manifest) as reader:
            result = _products({tensor.name: reader.tensor(tensor) for tensor in manifest.tensors})
        for index, product in enumerate(result):
            mean = np.mean([own[index] for own in products], axis=0)
            u, values, vt = np.linalg.svd(mean)
            np.testing.assert_allclose(product, (u[:, :4] * values[:4]) @ vt[:4], atol=1e-5)
    shard.close()


def test_the_directions_that_a_site_gets_are_the_best_of_their_number(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    spec = RunSpec.of(model="m", rounds=1, lora_rank=4, aggregator="svd")
    model = AdapterModel(load_base_model(str(folder), device="cpu"), spec)
    manifest = model.manifest()
    paths = []
    for seed in range(2):
        random = np.random.default_rng(seed)
        paths.append(tmp_path / str(seed))
        values_of = lambda tensor, random=random: random.normal(size=tensor.shape).astype(np.float32)  # noqa: E731
        write_adapter(paths[-1], manifest, values_of, "float32")
    aggregate(
        manifest,
        paths[0],
        [Update(str(seed), path, 0.5) for seed, path in enumerate(paths)],
        aggregator=AGGREGATORS["svd"],
        optimizer=OPTIMIZERS["none"],
        spec=spec.aggregation,
        slots={},
        scratch=lambda name: tmp_path / name,
        round_number=1,
    )
    model.load(tmp_path / "aggregate")
    values = model.values()
    whole = _products({tensor.name: values(tensor).copy() for tensor in manifest.tensors})
    model.truncate(2)
    for product, full in zip(_products({t.name: values(t) for t in manifest.tensors}), whole, strict=True):
        u, strengths, vt = np.linalg.svd(full)
        np.testing.assert_allclose(product, (u[:, :2] * strengths[:2]) @ vt[:2], atol=1e-4)


def test_another_aggregator_refuses_it_by_name(tmp_path: Path) -> None:
    model = AdapterModel(
        load_base_model(str(make_model(tmp_path / "model")), device="cpu"), RunSpec.of(model="m", rounds=1)
    )
    with pytest.raises(TaskError, match="--max-lora-rank takes a run with --aggregator svd, this one has fedavg"):
        model.truncate(2)


def _products(tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """B A of each layer."""
    return [
        tensors[name.replace(".lora_A.", ".lora_B.")].astype(np.float64) @ values
        for name, values in sorted(tensors.items())
        if ".lora_A." in name
    ]
