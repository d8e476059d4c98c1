"""Robust rules against reference implementations, on LoRA's products, and with one vote for each party."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedhds.spec import RunSpec
from fedhds.spec.robust import ROBUST_SPECS, ActiveRobustSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds_server.aggregation import AGGREGATORS, Update, aggregate, geometry
from fedhds_server.aggregation.pipeline import Aggregated
from fedhds_server.aggregation.robust import ROBUST_RULES, CoordinateRule, DistanceRule, mixing_matrix
from fedhds_server.aggregation.robust.centers import weiszfeld
from fedhds_server.aggregation.robust.mixing import buckets, nearest_neighbor
from fedhds_server.aggregation.scores import scores_of
from fedhds_server.optimizers import OPTIMIZERS
from tests.support.manifests import lora_manifest

Doubles = npt.NDArray[np.float64]
Values = dict[TensorSpec, FloatArray]

MANIFEST = lora_manifest(
    {f"{name}.lora_{key}.weight": shape for name in "qv" for key, shape in (("A", (2, 5)), ("B", (4, 2)))}
)
RULES = sorted(ROBUST_RULES)
COORDINATE = [name for name in RULES if isinstance(ROBUST_RULES[name], CoordinateRule)]

# Five vectors that are near each other and two that are not.
VECTORS = np.array(
    [
        [1.0, 2.0, -1.0],
        [1.5, 1.0, -0.5],
        [0.5, 2.5, -2.0],
        [2.0, 1.5, -1.25],
        [1.25, 0.25, -0.75],
        [9.0, -7.0, 5.0],
        [-6.0, 8.0, 11.0],
    ]
)


def active(rule: str, **fields: object) -> ActiveRobustSpec:
    robust = RunSpec.of(
        model="m", rounds=1, aggregator="ffa", min_sites=99, robust_rule=rule, **fields
    ).aggregation.robust
    assert isinstance(robust, ActiveRobustSpec)
    return robust


def of_vectors(rule: str, vectors: Doubles = VECTORS, **fields: object) -> Doubles:
    """What a rule makes of vectors."""
    chosen, parameters = ROBUST_RULES[rule], active(rule, **fields)
    if isinstance(chosen, CoordinateRule):
        return chosen.combine(parameters, vectors)
    assert isinstance(chosen, DistanceRule)
    return chosen.weights(parameters, vectors @ vectors.T) @ vectors


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        # byzfl 0.0.11: Median()(VECTORS); the same in Flower 1.x: aggregate_median.
        ("median", {}, [1.25, 1.5, -0.75]),
        # byzfl TrMean(1) and TrMean(2); Flower: aggregate_trimmed_avg with 1/7 and 2/7.
        ("trimmed-mean", {"byzantine_sites": 1}, [1.25, 1.45, 0.3]),
        ("trimmed-mean", {"byzantine_sites": 2}, [1.25, 1.5, -0.75]),
        # Flower: aggregate_krum(VECTORS, f, 0). byzfl takes one neighbor more than the paper: its Krum(f + 1).
        ("krum", {"byzantine_sites": 1}, [1.0, 2.0, -1.0]),
        ("krum", {"byzantine_sites": 2}, [1.5, 1.0, -0.5]),
        # Flower: aggregate_krum(VECTORS, f, to_keep=7 - f).
        ("multi-krum", {"byzantine_sites": 1}, [2.5416666666666665, 0.041666666666666664, -0.08333333333333333]),
        ("multi-krum", {"byzantine_sites": 2}, [1.25, 1.45, -1.1]),
        # byzfl GeometricMedian(nu=1e-9, T=3000): converged.
        ("geometric-median", {}, [1.4400519368762552, 1.125672413219716, -0.6147698253659786]),
        # byzfl CenteredClipping(L=3, tau=1.5).
        (
            "centered-clipping",
            {"clipping_radius": 1.5, "clipping_iterations": 3},
            [1.2727191576462162, 1.2213810095677016, -0.5899245956624463],
        ),
    ],
)
def test_rules_are_those_of_published_implementations(rule: str, fields: dict[str, Any], expected: list[float]) -> None:
    np.testing.assert_allclose(of_vectors(rule, **fields), expected, rtol=1e-6)


def test_weiszfeld_is_smoothed_as_published() -> None:
    # byzfl 0.0.11: GeometricMedian(nu=0.1, T=5)(VECTORS).
    expected = [1.4377262709385965, 1.1326851923596006, -0.6201124595048979]
    np.testing.assert_allclose(weiszfeld(VECTORS @ VECTORS.T, 0.1, 5) @ VECTORS, expected, rtol=1e-9)


def test_mixing_is_that_of_a_published_implementation() -> None:
    # byzfl 0.0.11: NNM(2)(VECTORS), and Bucketing(3)(VECTORS) with this permutation in place of its random one.
    near = [1.25, 1.45, -1.1]
    np.testing.assert_allclose(
        nearest_neighbor(VECTORS @ VECTORS.T, 2) @ VECTORS, [near] * 5 + [[2.95, -0.45, 0.3], [-0.35, 2.75, 1.35]]
    )
    np.testing.assert_allclose(
        buckets([3, 0, 6, 2, 5, 1, 4], 3) @ VECTORS,
        [[-1, 23 / 6, 35 / 12], [11 / 3, -7 / 6, 5 / 6], [1.25, 0.25, -0.75]],
    )
    # byzfl: TrMean(1)(NNM(1)(VECTORS)), GeometricMedian(nu=0.1, T=8)(NNM(1)(VECTORS)).
    mixed = nearest_neighbor(VECTORS @ VECTORS.T, 1) @ VECTORS
    trimmed = of_vectors("trimmed-mean", mixed)
    np.testing.assert_allclose(trimmed, [2.5416666666666665, 0.041666666666666664, -0.08333333333333333])
    center = weiszfeld(mixed @ mixed.T, 0.1, 8) @ mixed
    np.testing.assert_allclose(center, [2.530326436376003, 0.05300689695732999, -0.07879724121706799], rtol=1e-6)


def test_buckets_are_drawn_anew_each_round_and_hold_each_party_once() -> None:
    sites = [f"{number:02}" for number in range(7)]
    shares, gram = np.full(7, 1 / 7), np.eye(7)
    parameters = active("geometric-median", robust_mixing="bucketing")
    drawn = [mixing_matrix(parameters, sites, shares, gram, seed=1, round_number=number) for number in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    for matrix in drawn:
        assert matrix.shape == (4, 7)
        assert ((matrix > 0).sum(axis=0) == 1).all()
        np.testing.assert_allclose(matrix.sum(axis=1), 1)


# LoRA's products.


def drawn(seed: int, scale: float = 1.0, manifest: AdapterManifest = MANIFEST) -> Values:
    return {
        spec: (scale * np.random.default_rng([seed, *spec.name.encode()]).normal(size=spec.shape)).astype(np.float32)
        for spec in manifest.tensors
    }


def products(values: Mapping[TensorSpec, npt.NDArray[np.floating]]) -> list[Doubles]:
    specs = sorted(values, key=lambda spec: spec.name)
    factors = zip(specs[::2], specs[1::2], strict=True)
    return [values[b].astype(np.float64) @ values[a].astype(np.float64) for a, b in factors]


@pytest.mark.parametrize("roles", [{"lora_A", "lora_B"}, {"lora_A"}, {"lora_B"}])
@pytest.mark.parametrize("block", [32 << 20, 8 * 40, 1])
def test_inner_products_and_the_gap_are_those_of_dense_products(
    monkeypatch: pytest.MonkeyPatch, roles: set[str], block: int
) -> None:
    monkeypatch.setattr(geometry, "BLOCK_BYTES", block)
    current, changes = drawn(0), [drawn(number, 0.3) for number in range(1, 8)]
    shares = np.arange(1, 8) / 28
    trained = frozenset(spec for spec in MANIFEST.tensors if spec.role in roles)
    result = geometry.geometry(
        MANIFEST.tensors, trained, current.__getitem__, lambda index, spec: changes[index][spec], shares
    )
    sites = [
        {spec: current[spec].astype(np.float64) + (change[spec] if spec in trained else 0) for spec in current}
        for change in changes
    ]
    flat = np.array([np.concatenate([at.ravel() for at in products(site)]) for site in sites])
    moved = flat - np.concatenate([at.ravel() for at in products(current)])
    np.testing.assert_allclose(result.gram, moved @ moved.T, rtol=1e-9, atol=1e-9)
    mean = {spec: np.tensordot(shares, [site[spec] for site in sites], 1) for spec in current}
    off = np.concatenate([at.ravel() for at in products(mean)]) - shares @ flat
    if len(roles) == 2:
        assert result.gap is not None
        assert result.gap == pytest.approx(np.linalg.norm(off) / np.linalg.norm(shares @ flat), rel=1e-9)
        assert result.gap > 0.01
    else:
        assert result.gap is None


# The pipeline.


def written(path: Path, values: Values, manifest: AdapterManifest = MANIFEST) -> Path:
    write_adapter(path, manifest, lambda spec: values[spec], "float32")
    return path


def read(path: Path) -> Values:
    with AdapterReader(path, MANIFEST) as reader:
        return {spec: reader.tensor(spec) for spec in MANIFEST.tensors}


def aggregator_of(rule: str) -> str:
    """One under which the rule may be used."""
    return "alternating" if rule in COORDINATE else "fedavg"


def combined(
    folder: Path,
    updates: Mapping[str, Values],
    rule: str,
    *,
    current: Values | None = None,
    aggregator: str = "",
    shares: Mapping[str, float] | None = None,
    reverse: bool = False,
    **fields: object,
) -> Aggregated:
    """Aggregates round 1 into `folder`/aggregate."""
    aggregator = aggregator or aggregator_of(rule)
    spec = RunSpec.of(model="m", rounds=1, min_sites=99, aggregator=aggregator, robust_rule=rule, **fields).aggregation
    trained = MANIFEST.only(AGGREGATORS[aggregator].trainable(spec.aggregator, 1, MANIFEST.roles))
    base = written(folder / "current", current or drawn(0))
    made = [
        Update(
            site, written(folder / site.replace("/", "-"), values, trained), (shares or {}).get(site, 1 / len(updates))
        )
        for site, values in updates.items()
    ]
    return aggregate(
        MANIFEST,
        base,
        made[::-1] if reverse else made,
        aggregator=AGGREGATORS[aggregator],
        optimizer=OPTIMIZERS["none"],
        spec=spec,
        slots={},
        scratch=lambda name: folder / name,
        round_number=1,
        seed=5,
    )


def near(center: Values, seed: int, spread: float = 0.01) -> Values:
    noise = drawn(seed, spread)
    return {spec: center[spec] + noise[spec] for spec in center}


MIXINGS = ("none", "nearest-neighbor", "bucketing")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_equal_sites_are_as_one_site_which_is_its_local_training(tmp_path: Path, rule: str, mixing: str) -> None:
    own = drawn(3)
    for count in (1, 9):
        updates = {f"{number}": own for number in range(count)}
        hostile = 1 if count > 1 else 0
        result = combined(tmp_path, updates, rule, byzantine_sites=hostile, robust_mixing=mixing)
        assert result.refused == ""
        roles = AGGREGATORS[aggregator_of(rule)].trainable(None, 1, MANIFEST.roles)
        expected = {spec: own[spec] if spec.role in roles else drawn(0)[spec] for spec in own}
        for spec, values in read(tmp_path / "aggregate").items():
            np.testing.assert_allclose(values, expected[spec], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mixing", MIXINGS)
def test_the_order_of_sites_changes_no_bit(tmp_path: Path, rule: str, mixing: str) -> None:
    updates = {f"{number}": drawn(number) for number in range(9)}
    results = [
        combined(tmp_path, updates, rule, robust_mixing=mixing, reverse=reverse, shares={"0": 0.9}).adapter
        for reverse in (False, True)
    ]
    assert results[0] == results[1]


COMPOSED = [
    (rule, aggregator)
    for rule in RULES
    for aggregator in ("fedavg", "svd", "ffa", "alternating")
    # Refused, as another test shows.
    if rule not in COORDINATE or aggregator in ("ffa", "alternating")
]


@pytest.mark.parametrize(("rule", "aggregator"), COMPOSED)
def test_three_of_ten_hostile_parties_do_not_take_the_round_over(tmp_path: Path, rule: str, aggregator: str) -> None:
    center = near(drawn(0), 99, 0.2)
    updates = {f"{number}": near(center, number) for number in range(7)}
    updates |= {f"x{number}": near(drawn(50, 100.0), number) for number in range(3)}
    # A claim of many rows buys nothing.
    shares = {"x0": 0.5}
    combined(tmp_path, updates, rule, aggregator=aggregator, shares=shares, byzantine_sites=3)
    robust = read(tmp_path / "aggregate")
    combined(tmp_path, updates, "none", aggregator=aggregator, shares=shares)
    mean = read(tmp_path / "aggregate")
    roles = AGGREGATORS[aggregator].trainable(None, 1, MANIFEST.roles)
    wanted = products({spec: center[spec] if spec.role in roles else drawn(0)[spec] for spec in center})
    before = products(drawn(0))

    def distance(values: Values) -> float:
        return float(
            np.sqrt(sum(np.square(at - want).sum() for at, want in zip(products(values), wanted, strict=True)))
        )

    moved = float(np.sqrt(sum(np.square(at - want).sum() for at, want in zip(before, wanted, strict=True))))
    assert distance(robust) < moved < distance(mean) / 10


def test_sites_of_one_party_have_one_vote(tmp_path: Path) -> None:
    honest = {f"{number}": near(drawn(0), number, 0.1) for number in range(3)}
    evil = drawn(8, 50.0)
    many = honest | {f"evil/{number}": evil for number in range(7)}
    for rule in ("geometric-median", "median", "trimmed-mean"):
        split = combined(tmp_path, many, rule).adapter
        assert split == combined(tmp_path, honest | {"evil": evil}, rule).adapter


def test_a_partys_updates_are_averaged_by_their_shares(tmp_path: Path) -> None:
    first, second = drawn(1), drawn(2)
    mean = {spec: np.float32(0.75) * first[spec] + np.float32(0.25) * second[spec] for spec in first}
    others = {"x": drawn(3), "y": drawn(4)}
    combined(tmp_path, {"p/a": first, "p/b": second, **others}, "median", shares={"p/a": 0.3, "p/b": 0.1})
    split = read(tmp_path / "aggregate")
    combined(tmp_path, {"p": mean, **others}, "median")
    for spec, values in read(tmp_path / "aggregate").items():
        np.testing.assert_allclose(split[spec], values, rtol=1e-5, atol=1e-6)


def test_krum_takes_one_update_as_it_is(tmp_path: Path) -> None:
    updates = {f"{number}": near(drawn(9), number) for number in range(5)}
    result = combined(tmp_path, updates, "krum")
    assert result.adapter in [Artifact.of_file(tmp_path / site) for site in updates]


def test_updates_whose_norms_are_bounded_count_in_part(tmp_path: Path) -> None:
    current, update = drawn(0), drawn(1, 1e30)
    base, path = written(tmp_path / "current", current), written(tmp_path / "a", update)
    aggregate(
        MANIFEST,
        base,
        [Update("a", path, 1.0, scale=1e-30)],
        aggregator=AGGREGATORS["fedavg"],
        optimizer=OPTIMIZERS["none"],
        spec=RunSpec.of(model="m", rounds=1).aggregation,
        slots={},
        scratch=lambda name: tmp_path / name,
        round_number=1,
    )
    small = drawn(1)
    for spec, values in read(tmp_path / "aggregate").items():
        np.testing.assert_allclose(values, current[spec] + small[spec], rtol=1e-5, atol=1e-6)


def test_memory_of_a_median_is_that_of_one_tensor_of_the_cohort(tmp_path: Path) -> None:
    count, peaks = 20, []
    for layers in (1, 4):
        manifest = lora_manifest(
            {
                f"{n}.lora_{key}.weight": shape
                for n in range(layers)
                for key, shape in (("A", (8, 2048)), ("B", (2048, 8)))
            }
        )
        spec = RunSpec.of(model="m", rounds=1, min_sites=99, aggregator="ffa", robust_rule="median").aggregation
        path = written(tmp_path / "update", drawn(1, manifest=manifest), manifest)
        trained = manifest.only(frozenset({"lora_B"}))
        sent = written(tmp_path / "sent", drawn(2, manifest=manifest), trained)
        tracemalloc.start()
        try:
            aggregate(
                manifest,
                path,
                [Update(f"{number:02}", sent, 1 / count) for number in range(count)],
                aggregator=AGGREGATORS["ffa"],
                optimizer=OPTIMIZERS["none"],
                spec=spec,
                slots={},
                scratch=lambda name: tmp_path / name,
                round_number=1,
            )
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


# Conditions.


@pytest.mark.parametrize(
    ("rule", "hostile", "mixing", "least"),
    [
        ("krum", 1, "none", 5),
        ("multi-krum", 2, "none", 7),
        ("trimmed-mean", 2, "none", 5),
        ("median", 1, "nearest-neighbor", 3),
        ("geometric-median", 3, "none", 7),
        ("centered-clipping", 1, "bucketing", 5),
        ("krum", 0, "none", 1),
    ],
)
def test_a_rule_whose_condition_does_not_hold_refuses_to_start_and_combines_nothing(
    tmp_path: Path, rule: str, hostile: int, mixing: str, least: int
) -> None:
    fields = {"byzantine_sites": hostile, "robust_mixing": mixing, "robust_rule": rule, "aggregator": "ffa"}
    RunSpec.of(model="m", rounds=1, min_sites=least, **fields)
    if least > 1:
        with pytest.raises(
            ValueError, match=rf"robust_rule: {rule} against {hostile} .* needs {least}.* raise --min-sites"
        ):
            RunSpec.of(model="m", rounds=1, min_sites=least - 1, **fields)
        with pytest.raises(ValueError, match="may have 1;"):
            RunSpec.of(model="m", rounds=1, min_sites=least, cohort_fraction=0.1, **fields)
    for count in {least - 1, least} - {0}:
        updates = {f"{number}": drawn(number) for number in range(count)}
        # A second site makes no second party.
        updates["0/b"] = drawn(9)
        result = combined(tmp_path, updates, rule, aggregator="ffa", byzantine_sites=hostile, robust_mixing=mixing)
        kept = (tmp_path / "aggregate").read_bytes() == (tmp_path / "current").read_bytes()
        assert (bool(result.refused), kept) == (count < least, count < least)
        assert f"needs {least}" in (result.refused or f"needs {least}")


@pytest.mark.parametrize("rule", COORDINATE)
def test_rules_by_value_need_rounds_that_train_one_factor(rule: str) -> None:
    for aggregator in ("fedavg", "svd"):
        with pytest.raises(ValueError, match=f"robust_rule: {rule} takes each value by itself.*{aggregator} does not"):
            RunSpec.of(model="m", rounds=1, min_sites=5, aggregator=aggregator, robust_rule=rule)
    for aggregator in ("alternating", "ffa"):
        RunSpec.of(model="m", rounds=1, min_sites=5, aggregator=aggregator, robust_rule=rule)


def test_every_rule_of_the_specification_is_built() -> None:
    assert ROBUST_RULES.keys() == ROBUST_SPECS.keys() - {"none"}


# Scores.


def test_scores_show_a_hostile_update_and_one_against_the_others() -> None:
    vectors = np.array([[1.0, 0.1], [1.1, 0.0], [0.9, 0.05], [1.0, -0.1], [-1.0, 0.0], [50.0, 0.0]])
    scores = scores_of("abcdxy", vectors @ vectors.T, np.full(6, 1 / 6))
    assert max(scores[site].distance for site in "abcd") < 2 < scores["x"].distance < scores["y"].distance
    assert scores["x"].cosine < -0.9
    assert scores["a"].cosine > 0.9


def test_scores_of_one_update_and_of_equal_ones_say_nothing() -> None:
    assert scores_of("a", np.ones((1, 1)), np.ones(1)) == {}
    equal = scores_of("abc", np.ones((3, 3)), np.full(3, 1 / 3))
    assert {(score.distance, round(score.cosine, 9)) for score in equal.values()} == {(1.0, 1.0)}
    assert {
        (score.distance, score.cosine) for score in scores_of("ab", np.zeros((2, 2)), np.full(2, 0.5)).values()
    } == {(1.0, 0.0)}
