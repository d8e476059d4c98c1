"""One suite for every aggregator, FedAvg's arithmetic, and what an update must be before it is folded."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedhds.errors import AdapterError, StorageError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterDtype, AdapterReader, write_adapter
from fedhds_server.aggregation import AGGREGATORS, Aggregator, Update, validate_update
from fedhds_server.aggregation.weights import bounded_shares
from tests.manifests import lora_manifest

MANIFEST = lora_manifest({"q.lora_A.weight": (2, 3), "q.lora_B.weight": (4, 2)})
A, B = MANIFEST.tensors
DTYPES: tuple[AdapterDtype, ...] = get_args(AdapterDtype)


@pytest.fixture(params=sorted(AGGREGATORS))
def aggregator(request: pytest.FixtureRequest) -> Aggregator:
    return AGGREGATORS[request.param]


def written(path: Path, seed: int, dtype: AdapterDtype = "float32") -> Path:
    """An adapter of random values."""
    random = np.random.default_rng(seed)
    write_adapter(path, MANIFEST, lambda spec: random.normal(size=spec.shape).astype(np.float32), dtype)
    return path


def filled(path: Path, value: float) -> Path:
    """An adapter that holds one value everywhere."""
    write_adapter(path, MANIFEST, lambda spec: np.full(spec.shape, value, np.float32), "float32")
    return path


def updates_of(folder: Path, weights: Mapping[str, float], dtype: AdapterDtype = "float32") -> list[Update]:
    """One random update per site."""
    return [
        Update(site, written(folder / site, seed + 1, dtype), weight)
        for seed, (site, weight) in enumerate(sorted(weights.items()))
    ]


def read(path: Path) -> dict[str, FloatArray]:
    with AdapterReader(path, MANIFEST) as reader:
        return {spec.name: reader.tensor(spec) for spec in MANIFEST.tensors}


# All aggregators.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 0.0, "b": 0.0}])
def test_updates_without_weight_leave_the_global_adapter_as_it_is(
    aggregator: Aggregator, tmp_path: Path, dtype: AdapterDtype, weights: dict[str, float]
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    artifact = aggregator.aggregate(MANIFEST, current, updates_of(tmp_path, weights), tmp_path / "out", dtype)
    assert (tmp_path / "out").read_bytes() == current.read_bytes()
    assert artifact == Artifact.of_file(current)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_without_weight_is_as_if_it_had_not_come(
    aggregator: Aggregator, tmp_path: Path, dtype: AdapterDtype
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    updates = updates_of(tmp_path, {"a": 3, "c": 1}, dtype)
    without = aggregator.aggregate(MANIFEST, current, updates, tmp_path / "without", dtype)
    empty = Update("b", written(tmp_path / "b", 9, dtype), 0)
    assert aggregator.aggregate(MANIFEST, current, [*updates, empty], tmp_path / "with", dtype) == without


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_named_by_its_digest_and_has_the_runs_wire_type(
    aggregator: Aggregator, tmp_path: Path, dtype: AdapterDtype
) -> None:
    current = written(tmp_path / "current", 0, dtype)
    updates = updates_of(tmp_path, {"a": 1, "b": 2}, dtype)
    artifact = aggregator.aggregate(MANIFEST, current, updates, tmp_path / "out", dtype)
    assert artifact == Artifact.of_file(tmp_path / "out")
    # Equal tensors in the same wire type are equal bytes, so this is that type, and rounded no further.
    found = read(tmp_path / "out")
    assert write_adapter(tmp_path / "again", MANIFEST, lambda spec: found[spec.name], dtype) == artifact
    assert artifact.size == current.stat().st_size


def test_the_order_of_arrival_changes_no_bit(aggregator: Aggregator, tmp_path: Path) -> None:
    current = written(tmp_path / "current", 0)
    # In float64 too, (1e30 + 1) - 1e30 is another number than (1e30 - 1e30) + 1.
    values = {"a": 1e30, "b": 1.0, "c": -1e30, "d": 3e-8}
    updates = [Update(site, filled(tmp_path / site, value), 1) for site, value in values.items()]
    results = {
        aggregator.aggregate(MANIFEST, current, order, tmp_path / "out", "float32")
        for order in itertools.permutations(updates)
    }
    assert len(results) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(AGGREGATORS)),
    st.sampled_from(("float32", "bfloat16")),
    st.dictionaries(st.text("abc/", min_size=1, max_size=3), st.integers(0, 2), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_any_cohort_gives_the_same_bytes_in_any_order(
    name: str, dtype: AdapterDtype, weights: dict[str, int], random: Random
) -> None:
    def cancelling(spec: TensorSpec) -> FloatArray:
        # Values whose sum depends on the order in which they are added.
        values = random.choices((1e30, -1e30, 1e10, -1e10, 1.0, 3e-8), k=int(np.prod(spec.shape)))
        return np.array(values, np.float32).reshape(spec.shape)

    with TemporaryDirectory() as created:
        folder = Path(created)
        current = written(folder / "current", 0, dtype)
        updates = []
        for number, (site, weight) in enumerate(weights.items()):
            write_adapter(folder / str(number), MANIFEST, cancelling, dtype)
            updates.append(Update(site, folder / str(number), float(weight)))
        first = AGGREGATORS[name].aggregate(MANIFEST, current, updates, folder / "first", dtype)
        random.shuffle(updates)
        assert AGGREGATORS[name].aggregate(MANIFEST, current, updates, folder / "second", dtype) == first


def test_memory_does_not_grow_with_the_cohort(aggregator: Aggregator, tmp_path: Path) -> None:
    side = 256
    manifest = lora_manifest({f"{n}.lora_A.weight": (side, side) for n in range(4)})
    path = tmp_path / "update"
    write_adapter(path, manifest, lambda spec: np.ones(spec.shape, np.float32), "float32")
    updates = [Update(f"{number:02}", path, 1) for number in range(40)]
    tracemalloc.start()
    try:
        aggregator.aggregate(manifest, path, updates, tmp_path / "out", "float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One tensor of each update would be 40 tensors.
    assert peak < 16 * 4 * side * side


def test_an_update_that_does_not_fit_is_refused_by_name_and_gives_no_file(
    aggregator: Aggregator, tmp_path: Path
) -> None:
    current = written(tmp_path / "current", 0)
    odd = lora_manifest({A.name: (3, 2), B.name: B.shape})
    write_adapter(tmp_path / "odd", odd, lambda spec: np.zeros(spec.shape, np.float32), "float32")
    nan = filled(tmp_path / "nan", float("nan"))
    for path, words in ((tmp_path / "odd", r"q\.lora_A\.weight has shape \(3, 2\)"), (nan, "not finite")):
        updates = [*updates_of(tmp_path, {"a": 1}), Update("b", path, 1)]
        with pytest.raises(AdapterError, match=words):
            aggregator.aggregate(MANIFEST, current, updates, tmp_path / "out", "float32")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [{}, {"a": 1.0}])
def test_a_file_that_cannot_be_written_is_a_named_error(
    aggregator: Aggregator, tmp_path: Path, weights: dict[str, float]
) -> None:
    current = written(tmp_path / "current", 0)
    (tmp_path / "absent").write_text("a file where a folder is needed")
    with pytest.raises(StorageError, match="absent"):
        aggregator.aggregate(MANIFEST, current, updates_of(tmp_path, weights), tmp_path / "absent" / "out", "float32")


def test_an_update_that_has_vanished_is_a_named_error(aggregator: Aggregator, tmp_path: Path) -> None:
    current = written(tmp_path / "current", 0)
    with pytest.raises(StorageError, match="vanished"):
        aggregator.aggregate(MANIFEST, current, [Update("a", tmp_path / "vanished", 1)], tmp_path / "out", "float32")


# FedAvg.


def fedavg(folder: Path, updates: list[Update], dtype: AdapterDtype = "float32") -> dict[str, FloatArray]:
    # Far from the updates, so that a share of it would show.
    current = filled(folder / "current", 1000.0)
    AGGREGATORS["fedavg"].aggregate(MANIFEST, current, updates, folder / "out", dtype)
    return read(folder / "out")


def reference(updates: list[Update]) -> dict[str, npt.NDArray[np.float64]]:
    tensors = [read(update.path) for update in updates]
    weights = [update.weight for update in updates]
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
    updates = [Update(site, filled(tmp_path / site, value), 1) for site, value in values.items()]
    np.testing.assert_allclose(fedavg(tmp_path, updates)[A.name], 1 / 3, rtol=1e-6)


def test_fedavg_of_one_update_is_that_update_whatever_its_weight(tmp_path: Path) -> None:
    for weight in (1, 3, 1e-9, 1e12):
        (update,) = updates_of(tmp_path, {"a": weight})
        assert all(np.array_equal(found, read(update.path)[name]) for name, found in fedavg(tmp_path, [update]).items())


def test_fedavg_of_the_largest_values_does_not_overflow(tmp_path: Path) -> None:
    largest = float(np.finfo(np.float32).max)
    updates = [
        Update(site, filled(tmp_path / site, largest), weight) for site, weight in (("a", 3), ("b", 7), ("c", 9))
    ]
    assert (fedavg(tmp_path, updates)[B.name] == np.float32(largest)).all()


# What an update must be.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_difference_over_all_tensors(tmp_path: Path, dtype: AdapterDtype) -> None:
    path, current = written(tmp_path / "update", 5, dtype), written(tmp_path / "current", 6, dtype)
    before = read(current)
    flat = np.concatenate([np.float64(tensor - before[name]).ravel() for name, tensor in read(path).items()])
    norm = float(np.linalg.norm(flat))
    validate_update(path, MANIFEST, current=current, largest_norm=norm * (1 + 1e-9))
    with pytest.raises(AdapterError, match="beyond --max-update-norm"):
        validate_update(path, MANIFEST, current=current, largest_norm=norm * (1 - 1e-6))


def test_an_update_beyond_the_norm_bound_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path, current = filled(tmp_path / "update", 3.0), filled(tmp_path / "current", 1.0)
    validate_update(path, MANIFEST, current=current, largest_norm=float(np.sqrt(14 * 4)))
    with pytest.raises(AdapterError, match=r"^it is 7\.483 away from the round's adapter, .* 7\.48$"):
        validate_update(path, MANIFEST, current=current, largest_norm=7.48)


def test_an_update_whose_difference_overflows_is_refused(tmp_path: Path) -> None:
    path, current = filled(tmp_path / "update", 3e38), filled(tmp_path / "current", -3e38)
    validate_update(path, MANIFEST, current=current, largest_norm=0)
    with pytest.raises(AdapterError, match="beyond"):
        validate_update(path, MANIFEST, current=current, largest_norm=1e300)


def test_an_update_that_is_not_finite_is_refused_though_only_its_last_value_is_not(tmp_path: Path) -> None:
    path = filled(tmp_path / "update", 1.0)
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.inf).tobytes())
    with pytest.raises(AdapterError, match=r"q\.lora_B\.weight holds values that are not finite"):
        validate_update(path, MANIFEST, current=path, largest_norm=0)


def test_an_update_of_other_tensors_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "update", 1.0)
    with pytest.raises(AdapterError, match=r"the first is 'q\.lora_B\.weight'"):
        validate_update(path, AdapterManifest((A,), "{}"), current=path, largest_norm=0)


# How much updates count.


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=12), st.floats(0.01, 1))
def test_shares_sum_to_one_and_none_is_above_the_bound(samples: list[int], largest: float) -> None:
    shares = bounded_shares(samples, largest)
    if not any(samples):
        assert not shares.any()
        return
    assert shares.sum() == pytest.approx(1)
    assert shares.max() <= max(largest, 1 / sum(count > 0 for count in samples)) * (1 + 1e-9)
    # Whoever brings more never counts less, and who brings nothing does not count.
    order = np.argsort(samples, kind="stable")
    assert (np.diff(shares[order]) >= -1e-12).all()
    assert not shares[np.array(samples) == 0].any()


def test_unbounded_shares_are_those_of_the_rows() -> None:
    np.testing.assert_allclose(bounded_shares([1, 2, 5], 1), [1 / 8, 2 / 8, 5 / 8])
    np.testing.assert_allclose(bounded_shares([1, 3, 10**18], 0.5), [1 / 8, 3 / 8, 1 / 2])
