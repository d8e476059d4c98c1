"""One suite for every aggregator and server optimizer, their arithmetic, and what an update must be to count."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import AdapterError, StorageError
from fedhds.spec import PEFT_SPECS, AggregationSpec, PeftSpec, RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterDtype, AdapterReader, largest_value, write_adapter
from fedhds_server.aggregation import AGGREGATORS, Aggregator, Update, aggregate, geometry
from fedhds_server.aggregation.pipeline import Aggregated
from fedhds_server.aggregation.weights import bounded_shares
from fedhds_server.optimizers import OPTIMIZERS
from fedhds_server.rpc.validation import check_update
from tests.support.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
A, B = MANIFEST.tensors
DTYPES: tuple[AdapterDtype, ...] = get_args(AdapterDtype)


@pytest.fixture(params=sorted(AGGREGATORS))
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return AGGREGATORS[request.param]


@pytest.fixture(params=sorted(OPTIMIZERS))
def optimizer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def fast(optimizer: str) -> dict[str, Any]:
    """Settings under which a step shows in 16 bits, too."""
    return {"server_learning_rate": 0.5} if "learning_rate" in type(spec_of(optimizer).optimizer).model_fields else {}


def spec_of(optimizer: str, dtype: AdapterDtype = "float32", **fields: object) -> AggregationSpec:
    return RunSpec.of(model="m", rounds=1, wire_dtype=dtype, server_optimizer=optimizer, **fields).aggregation


def combined(
    folder: Path,
    current: Path,
    updates: Sequence[Update],
    *,
    dtype: AdapterDtype = "float32",
    manifest: AdapterManifest = MANIFEST,
    aggregator: Aggregator = AGGREGATORS["fedavg"],
    optimizer: str = "none",
    slots: Mapping[str, Path] | None = None,
    round_number: int = 1,
    **fields: object,
) -> Aggregated:
    """Aggregates into `folder`/aggregate, with slots in `folder`/slot-NAME."""
    return aggregate(
        manifest,
        current,
        updates,
        aggregator=aggregator,
        optimizer=OPTIMIZERS[optimizer],
        spec=spec_of(optimizer, dtype, **fields),
        slots=slots or {},
        scratch=lambda name: folder / name,
        round_number=round_number,
    )


def sent(aggregator: Aggregator, round_number: int = 1) -> AdapterManifest:
    """The tensors that updates of a round have."""
    return MANIFEST.only(aggregator.trainable(None, round_number, MANIFEST.roles))


def written(path: Path, seed: int, dtype: AdapterDtype = "float32", manifest: AdapterManifest = MANIFEST) -> Path:
    """An adapter of random values."""

    def values(spec: TensorSpec) -> FloatArray:
        # By name: one tensor alone has the values that it has beside others.
        return np.random.default_rng([seed, *spec.name.encode()]).normal(size=spec.shape).astype(np.float32)

    write_adapter(path, manifest, values, dtype)
    return path


def slot(path: Path, seed: int) -> Path:
    """A slot of random values above 0, which sums of squares have, too."""
    random = np.random.default_rng(seed)
    write_adapter(path, MANIFEST, lambda spec: random.uniform(0.1, 1, spec.shape).astype(np.float32), "float32")
    return path


def filled(path: Path, value: float, manifest: AdapterManifest = MANIFEST) -> Path:
    """An adapter that holds one value everywhere."""
    write_adapter(path, manifest, lambda spec: np.full(spec.shape, value, np.float32), "float32")
    return path


def updates_of(
    folder: Path,
    weights: Mapping[str, float],
    dtype: AdapterDtype = "float32",
    manifest: AdapterManifest = MANIFEST,
) -> list[Update]:
    """One random update per site, with its share of all weights."""
    total = sum(weights.values()) or 1
    return [
        Update(site, written(folder / site, seed + 1, dtype, manifest), weight / total)
        for seed, (site, weight) in enumerate(sorted(weights.items()))
    ]


def read(path: Path) -> dict[str, FloatArray]:
    with AdapterReader(path, MANIFEST) as reader:
        return {spec.name: reader.tensor(spec) for spec in MANIFEST.tensors}


# All aggregators, with all server optimizers.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 0.0, "b": 0.0}])
def test_a_round_without_updates_leaves_adapter_and_slots_byte_for_byte(
    aggregator: Aggregator, optimizer: str, tmp_path: Path, dtype: AdapterDtype, weights: dict[str, float]
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    slots = {name: slot(tmp_path / f"old-{name}", 7) for name in OPTIMIZERS[optimizer].slots}
    result = combined(
        tmp_path,
        current,
        updates_of(tmp_path, weights),
        dtype=dtype,
        aggregator=aggregator,
        optimizer=optimizer,
        slots=slots,
    )
    assert (tmp_path / "aggregate").read_bytes() == current.read_bytes()
    assert result.adapter == Artifact.of_file(current)
    assert result.slots == {name: Artifact.of_file(path) for name, path in slots.items()}
    # Slots that stay are no new files.
    assert result.files == [(tmp_path / "aggregate", result.adapter)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_without_share_is_as_if_it_had_not_come(
    aggregator: Aggregator, optimizer: str, tmp_path: Path, dtype: AdapterDtype
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    updates = updates_of(tmp_path, {"a": 3, "c": 1}, dtype, sent(aggregator))
    without = combined(tmp_path, current, updates, dtype=dtype, aggregator=aggregator, optimizer=optimizer)
    updates.append(Update("b", written(tmp_path / "b", 9, dtype, sent(aggregator)), 0))
    assert combined(tmp_path, current, updates, dtype=dtype, aggregator=aggregator, optimizer=optimizer) == without


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_named_by_its_digest_and_has_the_runs_wire_type(
    aggregator: Aggregator, optimizer: str, tmp_path: Path, dtype: AdapterDtype
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    updates = updates_of(tmp_path, {"a": 1, "b": 2}, dtype, sent(aggregator))
    result = combined(tmp_path, current, updates, dtype=dtype, aggregator=aggregator, optimizer=optimizer)
    assert result.adapter == Artifact.of_file(tmp_path / "aggregate")
    # Equal tensors in the same wire type are equal bytes, so this is that type, and rounded no further.
    values = read(tmp_path / "aggregate")
    assert write_adapter(tmp_path / "again", MANIFEST, lambda spec: values[spec.name], dtype) == result.adapter
    assert result.adapter.size == current.stat().st_size
    # Slots are float32 whatever travels.
    names = OPTIMIZERS[optimizer].slots
    assert result.slots == {name: Artifact.of_file(tmp_path / f"slot-{name}") for name in names}
    for name in names:
        new = read(tmp_path / f"slot-{name}")
        again = write_adapter(tmp_path / "again", MANIFEST, lambda spec, new=new: new[spec.name], "float32")  # type: ignore[misc]
        assert again == result.slots[name]
    assert dict(result.files) == {
        tmp_path / "aggregate": result.adapter,
        **{tmp_path / f"slot-{name}": result.slots[name] for name in names},
    }


def test_the_order_of_arrival_changes_no_bit(aggregator: Aggregator, optimizer: str, tmp_path: Path) -> None:
    current = written(tmp_path / "current", 0)
    # In float64 too, (1e30 + 1) - 1e30 is another number than (1e30 - 1e30) + 1.
    values = {"a": 1e30, "b": 1.0, "c": -1e30, "d": 3e-8}
    updates = [Update(site, filled(tmp_path / site, value, sent(aggregator)), 0.25) for site, value in values.items()]
    results = [
        combined(tmp_path, current, order, aggregator=aggregator, optimizer=optimizer)
        for order in itertools.permutations(updates)
    ]
    assert all(result == results[0] for result in results)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(AGGREGATORS)),
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from(("float32", "bfloat16")),
    st.dictionaries(st.text("abc/", min_size=1, max_size=3), st.integers(0, 2), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_any_cohort_gives_the_same_bytes_in_any_order(
    name: str, optimizer: str, dtype: AdapterDtype, weights: dict[str, int], random: Random
) -> None:
    def cancelling(spec: TensorSpec) -> FloatArray:
        # Values whose sum depends on the order in which they are added.
        values = random.choices((1e30, -1e30, 1e10, -1e10, 1.0, 3e-8), k=int(np.prod(spec.shape)))
        return np.array(values, np.float32).reshape(spec.shape)

    with TemporaryDirectory() as created:
        folder = Path(created)
        current = written(folder / "current", 0, dtype)
        slots = {name: slot(folder / f"old-{name}", 1) for name in OPTIMIZERS[optimizer].slots}
        updates = []
        for number, (site, weight) in enumerate(weights.items()):
            write_adapter(folder / str(number), sent(AGGREGATORS[name]), cancelling, dtype)
            updates.append(Update(site, folder / str(number), weight / (sum(weights.values()) or 1)))
        results = []
        for _ in range(2):
            results.append(
                combined(
                    folder,
                    current,
                    updates,
                    dtype=dtype,
                    aggregator=AGGREGATORS[name],
                    optimizer=optimizer,
                    slots=slots,
                )
            )
            random.shuffle(updates)
        assert results[0] == results[1]


@pytest.mark.parametrize("name", sorted(AGGREGATORS.keys() - {"svd"}))
def test_memory_does_not_grow_with_the_cohort(
    name: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aggregator = AGGREGATORS[name]
    size, count = 1 << 14, 44
    shapes = {"A": (8, size // 8), "B": (size // 8, 8)}
    manifest = lora_manifest({f"{n}.lora_{key}.weight": shapes[key] for n in range(2) for key in "AB"})
    current, path = tmp_path / "current", tmp_path / "update"
    write_adapter(current, manifest, lambda spec: np.ones(spec.shape, np.float32), "float32")
    trained = manifest.only(aggregator.trainable(None, 1, manifest.roles))
    write_adapter(path, trained, lambda spec: np.ones(spec.shape, np.float32), "float32")
    updates = [Update(f"{number:02}", path, 1 / count) for number in range(count)]
    # Two updates of a layer, in float64.
    monkeypatch.setattr(geometry, "BLOCK_BYTES", 2 * 2 * 8 * size)
    tracemalloc.start()
    try:
        combined(tmp_path, current, updates, manifest=manifest, aggregator=aggregator, optimizer=optimizer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One tensor of each update would be 44 tensors.
    assert peak < 40 * 4 * size


def test_memory_of_svd_is_that_of_one_layer_of_the_cohort(tmp_path: Path) -> None:
    peaks = []
    for layers in (1, 4):
        shapes = {"A": (8, 256), "B": (256, 8)}
        manifest = lora_manifest({f"{n}.lora_{key}.weight": shapes[key] for n in range(layers) for key in "AB"})
        path = written(tmp_path / "update", 1, manifest=manifest)
        updates = [Update(f"{number:02}", path, 1 / 40) for number in range(40)]
        tracemalloc.start()
        try:
            combined(tmp_path, path, updates, manifest=manifest, aggregator=AGGREGATORS["svd"])
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_an_update_that_does_not_fit_is_refused_by_name_and_gives_no_file(
    aggregator: Aggregator, optimizer: str, tmp_path: Path
) -> None:
    current = written(tmp_path / "current", 0)
    trained = sent(aggregator)
    odd = lora_manifest({A.name: A.shape, B.name: (5, 2)}).only(trained.roles)
    write_adapter(tmp_path / "odd", odd, lambda spec: np.zeros(spec.shape, np.float32), "float32")
    nan = filled(tmp_path / "nan", float("nan"), trained)
    for path, words in ((tmp_path / "odd", r"q\.lora_B\.weight has shape \(5, 2\)"), (nan, "not finite")):
        updates = [*updates_of(tmp_path, {"a": 1}, manifest=trained), Update("b", path, 1)]
        with pytest.raises(AdapterError, match=words):
            combined(tmp_path, current, updates, aggregator=aggregator, optimizer=optimizer)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(("aggregate", "slot-"))]


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}])
def test_a_file_that_cannot_be_written_is_a_named_error(
    aggregator: Aggregator, optimizer: str, tmp_path: Path, weights: dict[str, float]
) -> None:
    current = written(tmp_path / "current", 0)
    (tmp_path / "absent").write_text("a file where a folder is needed")
    updates = updates_of(tmp_path, weights, manifest=sent(aggregator))
    with pytest.raises(StorageError, match="absent"):
        combined(tmp_path / "absent", current, updates, aggregator=aggregator, optimizer=optimizer)


def test_an_update_that_has_vanished_is_a_named_error(aggregator: Aggregator, optimizer: str, tmp_path: Path) -> None:
    current = written(tmp_path / "current", 0)
    with pytest.raises(StorageError, match="vanished"):
        combined(tmp_path, current, [Update("a", tmp_path / "vanished", 1)], aggregator=aggregator, optimizer=optimizer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_whose_roles_do_not_train_stay_as_they_are(optimizer: str, tmp_path: Path, dtype: AdapterDtype) -> None:
    current = written(tmp_path / "current", 0, dtype)
    slots = {name: slot(tmp_path / f"old-{name}", 7) for name in OPTIMIZERS[optimizer].slots}

    def after(aggregator: Aggregator, round_number: int) -> list[dict[str, FloatArray]]:
        updates = updates_of(tmp_path, {"a": 1, "b": 2}, dtype, sent(aggregator, round_number))
        combined(
            tmp_path,
            current,
            updates,
            dtype=dtype,
            aggregator=aggregator,
            optimizer=optimizer,
            slots=slots,
            round_number=round_number,
            **fast(optimizer),
        )
        return [read(tmp_path / "aggregate"), *(read(tmp_path / f"slot-{name}") for name in slots)]

    before = [read(current), *map(read, slots.values())]
    whole = after(AGGREGATORS["fedavg"], 1)
    for number, trained, frozen in ((1, B, A), (2, A, B)):
        for old, all_trained, new in zip(before, whole, after(AGGREGATORS["alternating"], number), strict=True):
            assert np.array_equal(new[frozen.name], old[frozen.name])
            assert np.array_equal(new[trained.name], all_trained[trained.name])
            assert not np.array_equal(new[trained.name], old[trained.name])


# Server optimizers.


def test_no_optimizer_takes_the_combined_update(tmp_path: Path) -> None:
    result = combined(tmp_path, filled(tmp_path / "current", 5.0), [Update("a", filled(tmp_path / "a", 2.0), 1)])
    assert (read(tmp_path / "aggregate")[A.name] == 2.0).all()
    assert result.slots == {}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_is_its_recurrence_over_rounds_that_each_reread_their_files(tmp_path: Path, momentum: float) -> None:
    current = written(tmp_path / "current", 0)
    slots: dict[str, Path] = {}
    value = {name: tensor.astype(np.float64) for name, tensor in read(current).items()}
    moved = {name: np.zeros_like(tensor) for name, tensor in value.items()}
    for number in range(1, 6):
        folder = tmp_path / str(number)
        folder.mkdir()
        updates = [
            Update("a", written(folder / "a", 10 * number), 0.25),
            Update("b", written(folder / "b", 10 * number + 1), 0.75),
        ]
        if number == 4:
            # Nobody delivers: the step of round 3 waits for round 5.
            updates = []
        result = combined(
            folder, current, updates, optimizer="momentum", slots=slots, round_number=number, server_momentum=momentum
        )
        current = folder / "aggregate"
        if updates:
            slots = {"momentum": folder / "slot-momentum"}
            mean = {name: 0.25 * at.astype(np.float64) for name, at in read(updates[0].path).items()}
            mean = {name: at + 0.75 * read(updates[1].path)[name] for name, at in mean.items()}
            moved = {name: momentum * moved[name] + (mean[name] - value[name]) for name in value}
            value = {name: value[name] + moved[name] for name in value}
        assert result.slots["momentum"] == Artifact.of_file(slots["momentum"])
        for name in value:
            np.testing.assert_allclose(read(current)[name], value[name], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(read(slots["momentum"])[name], moved[name], rtol=1e-5, atol=1e-6)


RATE, BETA1, BETA2, TAU = 0.02, 0.8, 0.95, 0.01
Doubles = npt.NDArray[np.float64]


def second_moment(optimizer: str, before: Doubles, delta: Doubles) -> Doubles:
    """v of Reddi et al. 2021, Alg. 2."""
    match optimizer:
        case "adagrad":
            return before + delta**2
        case "yogi":
            return before - (1 - BETA2) * delta**2 * np.sign(before - delta**2)
    return BETA2 * before + (1 - BETA2) * delta**2


@pytest.mark.parametrize("optimizer", ["adagrad", "yogi", "adam"])
def test_adaptive_optimizers_are_algorithm_2_over_rounds_that_each_reread_their_files(
    tmp_path: Path, optimizer: str
) -> None:
    # FedAdagrad is without momentum, as in the paper's section 5.
    beta1 = 0.0 if optimizer == "adagrad" else BETA1
    betas: dict[str, Any] = {} if optimizer == "adagrad" else {"server_beta1": BETA1, "server_beta2": BETA2}
    current = written(tmp_path / "current", 0)
    slots: dict[str, Path] = {}
    value = {name: tensor.astype(np.float64) for name, tensor in read(current).items()}
    mean = {name: np.zeros_like(tensor) for name, tensor in value.items()}
    squares = {name: np.full_like(tensor, TAU**2) for name, tensor in value.items()}
    for number in range(1, 7):
        folder = tmp_path / str(number)
        folder.mkdir()
        updates = [
            Update("a", written(folder / "a", 10 * number), 0.25),
            Update("b", written(folder / "b", 10 * number + 1), 0.75),
        ]
        combined(
            folder,
            current,
            updates,
            optimizer=optimizer,
            slots=slots,
            round_number=number,
            server_learning_rate=RATE,
            server_tau=TAU,
            **betas,
        )
        current = folder / "aggregate"
        slots = {name: folder / f"slot-{name}" for name in OPTIMIZERS[optimizer].slots}
        for name, before in value.items():
            delta = 0.25 * read(updates[0].path)[name] + 0.75 * read(updates[1].path)[name].astype(np.float64) - before
            mean[name] = beta1 * mean[name] + (1 - beta1) * delta
            squares[name] = second_moment(optimizer, squares[name], delta)
            value[name] = before + RATE * mean[name] / (np.sqrt(squares[name]) + TAU)
            np.testing.assert_allclose(read(current)[name], value[name], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(read(slots["squares"])[name], squares[name], rtol=1e-5)
            if "momentum" in slots:
                np.testing.assert_allclose(read(slots["momentum"])[name], mean[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_beyond_what_the_adapters_type_holds_ends_at_its_largest_value(
    tmp_path: Path, dtype: AdapterDtype
) -> None:
    largest = largest_value(dtype)
    current = filled(tmp_path / "current", 0.0)
    slots: dict[str, Path] = {}
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        update = Update("a", filled(folder / "a", largest), 1)
        combined(folder, current, [update], dtype=dtype, optimizer="momentum", slots=slots)
        current, slots = folder / "aggregate", {"momentum": folder / "slot-momentum"}
        assert (read(current)[A.name] == np.float32(largest)).all()
        assert np.isfinite(read(slots["momentum"])[A.name]).all()


def test_momentum_of_zero_is_no_optimizer(tmp_path: Path) -> None:
    current, updates = written(tmp_path / "current", 0), updates_of(tmp_path, {"a": 1, "b": 2})
    combined(tmp_path, current, updates, optimizer="momentum", server_momentum=0.0)
    with_momentum = read(tmp_path / "aggregate")
    combined(tmp_path, current, updates)
    for name, at in read(tmp_path / "aggregate").items():
        np.testing.assert_allclose(with_momentum[name], at, rtol=1e-6, atol=1e-7)


# FedAvg.


def fedavg(folder: Path, updates: list[Update], dtype: AdapterDtype = "float32") -> dict[str, FloatArray]:
    # Far from the updates, so that a share of it would show.
    current = filled(folder / "current", 1000.0)
    combined(folder, current, updates, dtype=dtype)
    return read(folder / "aggregate")


def reference(updates: list[Update]) -> dict[str, npt.NDArray[np.float64]]:
    tensors = [read(update.path) for update in updates]
    weights = [update.share for update in updates]
    return {
        spec.name: np.average([np.float64(at[spec.name]) for at in tensors], axis=0, weights=weights)
        for spec in MANIFEST.tensors
    }


# One rounding to the wire type, and nothing else, lies between the reference and the result.
@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2**-24), ("bfloat16", 2**-8), ("float16", 2**-11)])
@pytest.mark.parametrize("rows", [(1, 1), (10, 30, 0), (1, 1000, 7, 7, 15_011), (0.5, 0.25)])
def test_fedavg_is_the_mean_in_float64_weighted_by_rows(
    tmp_path: Path, dtype: AdapterDtype, rounding: float, rows: tuple[float, ...]
) -> None:
    updates = updates_of(tmp_path, {f"{number}": weight for number, weight in enumerate(rows)}, dtype)
    found = fedavg(tmp_path, updates, dtype)
    for name, mean in reference(updates).items():
        np.testing.assert_allclose(found[name], mean, rtol=1.01 * rounding, atol=1e-7 if dtype == "float16" else 1e-12)


def test_fedavg_adds_in_float64(tmp_path: Path) -> None:
    values = {"a": 1e8, "b": 1.0, "c": -1e8}
    updates = [Update(site, filled(tmp_path / site, value), 1 / 3) for site, value in values.items()]
    np.testing.assert_allclose(fedavg(tmp_path, updates)[A.name], 1 / 3, rtol=1e-6)


def test_fedavg_of_one_update_is_that_update_whatever_its_weight(tmp_path: Path) -> None:
    for weight in (1, 3, 1e-9, 1e12):
        (update,) = updates_of(tmp_path, {"a": weight})
        assert all(np.array_equal(found, read(update.path)[name]) for name, found in fedavg(tmp_path, [update]).items())


def test_fedavg_of_the_largest_values_does_not_overflow(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    updates = [
        Update(site, filled(tmp_path / site, largest), weight / 19) for site, weight in (("a", 3), ("b", 7), ("c", 9))
    ]
    assert (fedavg(tmp_path, updates)[B.name] == np.float32(largest)).all()


# LoRA's products.


def product(tensors: Mapping[str, FloatArray]) -> npt.NDArray[np.float64]:
    return tensors[B.name].astype(np.float64) @ tensors[A.name]


def dense_mean(current: Path, updates: Sequence[Update], manifest: AdapterManifest) -> npt.NDArray[np.float64]:
    """The mean of the sites' products; a factor that they did not send is the global adapter's."""
    total = np.zeros((B.shape[0], A.shape[1]))
    for update in updates:
        with AdapterReader(update.path, manifest) as reader:
            total += update.share * product(
                read(current) | {spec.name: reader.tensor(spec) for spec in manifest.tensors}
            )
    return total


@pytest.mark.parametrize(("name", "number"), [("alternating", 1), ("alternating", 2), ("ffa", 1), ("ffa", 2)])
def test_where_one_factor_trains_the_product_is_the_mean_of_the_products(
    tmp_path: Path, name: str, number: int
) -> None:
    rule, current = AGGREGATORS[name], written(tmp_path / "current", 0)
    updates = updates_of(tmp_path, {"a": 1, "b": 2, "c": 5}, manifest=sent(rule, number))
    combined(tmp_path, current, updates, aggregator=rule, round_number=number)
    result = read(tmp_path / "aggregate")
    np.testing.assert_allclose(product(result), dense_mean(current, updates, sent(rule, number)), rtol=1e-5, atol=1e-5)
    (frozen,) = set(MANIFEST.tensors) - set(sent(rule, number).tensors)
    assert np.array_equal(result[frozen.name], read(current)[frozen.name])
    # The factor that trains goes first while the other one is zero: B in round 1.
    assert frozen == (B if (name, number) == ("alternating", 2) else A)


def test_fedavg_is_not_the_mean_of_the_products(tmp_path: Path) -> None:
    current, updates = written(tmp_path / "current", 0), updates_of(tmp_path, {"a": 1, "b": 2, "c": 5})
    combined(tmp_path, current, updates)
    assert np.abs(product(read(tmp_path / "aggregate")) - dense_mean(current, updates, MANIFEST)).max() > 0.1


def test_one_site_alone_is_its_local_training(aggregator: Aggregator, tmp_path: Path) -> None:
    current = written(tmp_path / "current", 0)
    updates = updates_of(tmp_path, {"a": 3}, manifest=sent(aggregator))
    combined(tmp_path, current, updates, aggregator=aggregator)
    expected = dense_mean(current, updates, sent(aggregator))
    np.testing.assert_allclose(product(read(tmp_path / "aggregate")), expected, rtol=1e-5, atol=1e-5)


def test_equal_sites_are_as_one(aggregator: Aggregator, tmp_path: Path) -> None:
    current, manifest = written(tmp_path / "current", 0), sent(aggregator)
    updates = [Update(site, written(tmp_path / site, 4, manifest=manifest), 0.25) for site in "abcd"]
    combined(tmp_path, current, updates, aggregator=aggregator)
    expected = dense_mean(current, updates[:1], manifest) * 4
    np.testing.assert_allclose(product(read(tmp_path / "aggregate")), expected, rtol=1e-5, atol=1e-5)


def test_an_update_with_tensors_that_do_not_train_is_refused(tmp_path: Path) -> None:
    whole, half = (
        written(tmp_path / "whole", 1),
        written(tmp_path / "half", 1, manifest=MANIFEST.only(frozenset({B.role}))),
    )
    check_update(half, MANIFEST, current=whole, max_norm=1, roles=frozenset({B.role}))
    with pytest.raises(AdapterError, match=r"the first is 'q\.lora_A\.weight'"):
        check_update(whole, MANIFEST, current=whole, max_norm=0, roles=frozenset({B.role}))
    with pytest.raises(AdapterError, match=r"the first is 'q\.lora_A\.weight'"):
        check_update(half, MANIFEST, current=whole, max_norm=0)


@pytest.mark.parametrize("sites", [1, 2, 5])
def test_svd_is_the_truncated_svd_of_the_dense_mean(tmp_path: Path, sites: int) -> None:
    current = written(tmp_path / "current", 0)
    updates = updates_of(tmp_path, {f"{number}": number + 1 for number in range(sites)})
    combined(tmp_path, current, updates, aggregator=AGGREGATORS["svd"])
    result = read(tmp_path / "aggregate")
    u, values, vt = np.linalg.svd(dense_mean(current, updates, MANIFEST))
    np.testing.assert_allclose(product(result), (u[:, :2] * values[:2]) @ vt[:2], rtol=1e-5, atol=1e-5)
    # Balanced: each factor has the root of the singular values.
    a, b = result[A.name].astype(np.float64), result[B.name].astype(np.float64)
    np.testing.assert_allclose(a @ a.T, np.diag(values[:2]), atol=1e-5)
    np.testing.assert_allclose(b.T @ b, np.diag(values[:2]), atol=1e-5)
    assert (a[np.arange(2), np.abs(a).argmax(axis=1)] > 0).all()


def test_svd_keeps_a_new_adapter_trainable(tmp_path: Path) -> None:
    def values(spec: TensorSpec) -> FloatArray:
        return np.zeros(spec.shape, np.float32) if spec == B else np.arange(6, dtype=np.float32).reshape(spec.shape)

    def one_direction(spec: TensorSpec) -> FloatArray:
        return np.ones(spec.shape, np.float32) * (1 if spec == A else [2, 0])

    write_adapter(tmp_path / "zero", MANIFEST, values, "float32")
    write_adapter(tmp_path / "one", MANIFEST, one_direction, "float32")
    combined(tmp_path, tmp_path / "zero", [Update("a", tmp_path / "zero", 1)], aggregator=AGGREGATORS["svd"])
    assert all(np.array_equal(read(tmp_path / "aggregate")[spec.name], values(spec)) for spec in MANIFEST.tensors)
    combined(tmp_path, tmp_path / "zero", [Update("a", tmp_path / "one", 1)], aggregator=AGGREGATORS["svd"])
    result = read(tmp_path / "aggregate")
    np.testing.assert_allclose(product(result), 2, rtol=1e-6)
    # The second direction has B = 0, and an A through which it can learn.
    assert not result[B.name][:, 1].any()
    assert np.linalg.norm(result[A.name][1]) > 1


def test_svd_at_a_rank_above_the_layers_width(tmp_path: Path) -> None:
    manifest = lora_manifest({"q.lora_A.weight": (8, 3), "q.lora_B.weight": (4, 8)})
    path = written(tmp_path / "update", 1, manifest=manifest)
    updates = [Update("a", path, 1)]
    combined(tmp_path, path, updates, manifest=manifest, aggregator=AGGREGATORS["svd"])
    products = []
    for file in (path, tmp_path / "aggregate"):
        with AdapterReader(file, manifest) as reader:
            a, b = (reader.tensor(spec) for spec in manifest.tensors)
            products.append(b @ a)
    np.testing.assert_allclose(products[1], products[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{"server_optimizer": "momentum"}, {"wire_dtype": "int8"}])
def test_svd_refuses_what_adds_up_factors_of_several_rounds(fields: dict[str, str]) -> None:
    [(setting, value)] = fields.items()
    with pytest.raises(ValueError, match=f"{setting}: {value} adds .* svd"):
        RunSpec.of(model="m", rounds=1, aggregator="svd", **fields)


@pytest.mark.parametrize("name", ["alternating", "ffa", "svd"])
def test_rules_for_loras_factors_refuse_other_methods(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    class OtherSpec(PeftSpec):
        summary = "another one"
        method: Literal["other"] = "other"

    monkeypatch.setitem(PEFT_SPECS, "other", OtherSpec)
    spec_of("none", aggregator=name)
    spec_of("none", aggregator=name, use_rslora=True)
    for method in ({"peft_method": "other"}, {"peft_method": "ia3"}, {"use_dora": True}):
        with pytest.raises(ValueError, match=rf"aggregator: {name} needs .* A and B alone; .* without --use-dora"):
            spec_of("none", aggregator=name, **method)


# What an update must be.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_difference_over_all_tensors(tmp_path: Path, dtype: AdapterDtype) -> None:
    path, current = written(tmp_path / "update", 5, dtype), written(tmp_path / "current", 6, dtype)
    before = read(current)
    flat = np.concatenate([np.float64(tensor - before[name]).ravel() for name, tensor in read(path).items()])
    norm = float(np.linalg.norm(flat))
    check_update(path, MANIFEST, current=current, max_norm=norm * (1 + 1e-9))
    with pytest.raises(AdapterError, match="beyond --max-update-norm"):
        check_update(path, MANIFEST, current=current, max_norm=norm * (1 - 1e-6))


def test_an_update_beyond_the_norm_bound_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path, current = filled(tmp_path / "update", 3.0), filled(tmp_path / "current", 1.0)
    check_update(path, MANIFEST, current=current, max_norm=float(np.sqrt(14 * 4)))
    with pytest.raises(AdapterError, match=r"^it is 7\.483 away from the round's adapter, .* 7\.48$"):
        check_update(path, MANIFEST, current=current, max_norm=7.48)


def test_an_update_whose_difference_overflows_is_refused(tmp_path: Path) -> None:
    path, current = filled(tmp_path / "update", 3e38), filled(tmp_path / "current", -3e38)
    check_update(path, MANIFEST, current=current, max_norm=0)
    with pytest.raises(AdapterError, match="beyond"):
        check_update(path, MANIFEST, current=current, max_norm=1e300)


def test_an_update_that_is_not_finite_is_refused_though_only_its_last_value_is_not(tmp_path: Path) -> None:
    path = filled(tmp_path / "update", 1.0)
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(AdapterError, match=r"q\.lora_B\.weight holds values that are not finite"):
        check_update(path, MANIFEST, current=path, max_norm=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_must_be_finite_in_the_type_of_the_global_adapter(
    tmp_path: Path, dtype: AdapterDtype, sign: int
) -> None:
    largest = largest_value(dtype)
    path = filled(tmp_path / "update", sign * largest)
    check_update(path, MANIFEST, current=path, max_norm=0, dtype=dtype)
    if dtype != "float32":
        beyond = np.nextafter(np.float32(largest), np.float32(np.inf))
        path = filled(tmp_path / "beyond", sign * float(beyond))
        with pytest.raises(AdapterError, match=rf"q\.lora_A\.weight holds values beyond .* of the run's {dtype}"):
            check_update(path, MANIFEST, current=path, max_norm=0, dtype=dtype)


def test_an_update_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "update", 1.0)
    with pytest.raises(AdapterError, match=r"the first is 'q\.lora_B\.weight'"):
        check_update(path, AdapterManifest((A,), "{}"), current=path, max_norm=0)


# How much updates count.


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.floats(0.01, 1))
def test_shares_sum_to_one_and_none_is_above_the_bound(samples: list[int], largest: float) -> None:
    shares = bounded_shares(samples, largest)
    if not any(samples):
        assert not shares.any()
        return
    assert shares.sum() == pytest.approx(1)
    assert shares.max() <= max(largest, 1 / sum(count > 0 for count in samples)) * (1 + 1e-9)
    # A site that brings more never counts less, and one that brings nothing does not count.
    order = np.argsort(samples, kind="stable")
    assert (np.diff(shares[order]) >= -1e-12).all()
    assert not shares[np.array(samples) == 0].any()


def test_unbounded_shares_are_those_of_the_rows() -> None:
    np.testing.assert_allclose(bounded_shares([1, 2, 5], 1), [1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(bounded_shares([1, 3, 10**18], 0.5), [1 / 8, 3 / 8, 1 / 2])
