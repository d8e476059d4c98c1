"""The run's specification: nested, typed, open to more strategies, the same on the wire as in memory."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedhds.errors import AdapterError
from fedhds.kmeans import splitting_passes, total_passes
from fedhds.settings import VariantError, flat, parameter, settings_of
from fedhds.spec import (
    AGGREGATOR_SPECS,
    OPTIMIZER_SPECS,
    PEFT_SPECS,
    STRATEGY_SPECS,
    AggregatorSpec,
    FederatedKMeansSpec,
    FedHdsAlignedSpec,
    FedHdsSpec,
    LoraSpec,
    MomentumSpec,
    RunSpec,
    StrategySpec,
    WireDtype,
    budget_rows,
)
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest, Initial, TensorSpec
from tests.support.manifests import lora_manifest


def spec(**settings: Any) -> RunSpec:
    return RunSpec.of(**{"model": "m", "rounds": 1, **settings})


class NewestSpec(StrategySpec):
    """A strategy that a plug-in adds."""

    summary = "the newest rows"
    shared_space = False
    privacy_unit = None

    name: Literal["newest"] = "newest"
    max_age: float = parameter(7.0, "Oldest row that trains, in days.", gt=0)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGY_SPECS, "newest", NewestSpec)


def test_a_model_and_rounds_are_enough_and_defaults_are_complete() -> None:
    found = RunSpec.of(model="m", rounds=3)
    assert (found.model.name, found.rounds.count, found.schema_version) == ("m", 3, 2)
    assert found.selection.strategy == FedHdsAlignedSpec()
    assert found.peft == LoraSpec()
    assert (found.aggregation.aggregator.name, found.aggregation.optimizer.name) == ("fedavg", "none")


def test_flat_settings_reach_their_places() -> None:
    found = spec(lora_rank=4, selection_strategy="random", selection_budget="10", server_optimizer="momentum")
    assert isinstance(found.peft, LoraSpec)
    assert found.peft.rank == 4
    assert (found.selection.strategy.name, found.selection.budget) == ("random", "10")
    assert found.aggregation.optimizer == MomentumSpec(momentum=0.9)


def test_a_name_that_is_no_setting_is_a_type_error_that_names_it() -> None:
    with pytest.raises(TypeError, match="'learning_rat'"):
        spec(learning_rat=1)
    with pytest.raises(TypeError, match="schema_version"):
        spec(schema_version=2)


def test_a_parameter_of_another_strategy_is_refused() -> None:
    with pytest.raises(VariantError, match="kmeans_iterations: the selection strategy random has no such parameter"):
        spec(selection_strategy="random", kmeans_iterations=3)
    with pytest.raises(VariantError, match="server_momentum: the server optimizer none"):
        spec(server_momentum=0.5)


def test_values_can_be_replaced_by_flat_name() -> None:
    first = spec(selection_strategy="fedhds", reduction="pca", min_cluster_size=5, seed=7)
    changed = first.replace(selection_strategy="fedhds-aligned", rounds=2)
    assert changed.selection.strategy == FedHdsAlignedSpec(reduction="pca", min_cluster_size=5)
    assert (changed.rounds.count, changed.seed) == (2, 7)
    assert first.replace(selection_strategy="random").selection.strategy.name == "random"
    assert first.replace() == first
    with pytest.raises(VariantError):
        first.replace(selection_strategy="random", reduction="pca")
    with pytest.raises(ValidationError):
        first.replace(rounds=0)


def test_flat_values_are_those_in_force() -> None:
    values = flat(spec(selection_strategy="federated-kmeans", kmeans_iterations=3))
    assert (values["kmeans_iterations"], values["lora_rank"]) == (3, 8)
    assert not {"reduction", "server_momentum", "schema_version"} & values.keys()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"selection_strategy": name} for name in STRATEGY_SPECS),
        {"seed": 2**62, "lora_targets": ("q", "v"), "selection_clip_norm": 2.5, "selection_noise_multiplier": 0.1},
        {"server_optimizer": "momentum", "server_momentum": 0.3, "wire_dtype": "int8"},
    ],
)
def test_json_gives_back_the_same(settings: dict[str, Any]) -> None:
    found = spec(**settings)
    assert RunSpec.model_validate_json(found.model_dump_json()) == found
    assert RunSpec.model_validate(found.model_dump()) == found


@given(
    st.fixed_dictionaries(
        {
            "model": st.text(min_size=1).filter(lambda text: text.isprintable()),
            "learning_rate": st.floats(1e-300, 1e300),
            "seed": st.integers(0, 2**63 - 1),
            "selection_delta": st.floats(1e-12, 0.5),
            "lora_targets": st.lists(st.text(st.characters(categories=["L"]), min_size=1), min_size=1),
        }
    )
)
def test_json_gives_back_any_value(settings: dict[str, Any]) -> None:
    found = spec(**settings)
    assert RunSpec.model_validate_json(found.model_dump_json()) == found


def test_an_added_strategy_works_like_one_of_ours(newest: None) -> None:
    found = spec(selection_strategy="newest", max_age=3)
    assert found.selection.strategy == NewestSpec(max_age=3)
    assert RunSpec.model_validate_json(found.model_dump_json()) == found
    assert found.replace(max_age=4).selection.strategy == NewestSpec(max_age=4)
    [setting] = [setting for setting in settings_of(RunSpec) if setting.name == "max_age"]
    assert setting.description == "newest: Oldest row that trains, in days."
    assert setting.group == "Selection"


def test_an_unknown_strategy_is_refused_with_the_known_ones(newest: None) -> None:
    text = spec(selection_strategy="newest").model_dump_json().replace("newest", "oldest")
    words = "'oldest' is not a known selection strategy; choose one of full, random, fedhds, .*, newest"
    with pytest.raises(ValidationError, match=words):
        RunSpec.model_validate_json(text)


def test_an_instance_of_a_class_that_is_not_registered_is_refused() -> None:
    found = spec()
    with pytest.raises(ValidationError, match="'newest' is not a known"):
        type(found.selection)(strategy=NewestSpec())
    assert type(found.selection)(strategy=FedHdsSpec()).strategy.name == "fedhds"
    with pytest.raises(ValidationError, match="is not a selection strategy"):
        RunSpec.model_validate({**found.model_dump(), "selection": {"strategy": 5}})


def test_an_added_aggregator_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class MedianSpec(AggregatorSpec):
        summary = "their median"
        name: Literal["median"] = "median"

    monkeypatch.setitem(AGGREGATOR_SPECS, "median", MedianSpec)
    assert spec(aggregator="median").aggregation.aggregator == MedianSpec()


@pytest.mark.parametrize("version", [1, 3, "x", None])
def test_an_unknown_schema_is_refused_before_its_fields_are_read(version: object) -> None:
    with pytest.raises(ValidationError) as caught:
        RunSpec.model_validate_json(json.dumps({"schema_version": version, "a_new_field": 1}))
    [problem] = caught.value.errors()
    assert "same version of fedhds" in problem["msg"]
    assert repr(version) in problem["msg"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds.count"),
        ({"rounds": 2**32}, "rounds.count"),
        ({"learning_rate": math.nan}, "training.learning_rate"),
        ({"deadline": math.inf}, "finite number"),
        ({"selection_budget": "0"}, "auto, a count from 1, or a share up to 100%"),
        ({"selection_budget": "101%"}, "share up to 100%"),
        ({"selection_budget": "9" * 5000}, "a count from 1"),
        ({"quorum": "0%"}, "count from 1 or a share"),
        ({"quorum": "auto"}, "count from 1 or a share"),
        ({"feature_layers": "first"}, "numbers such as 0,6,-1"),
        ({"selection_noise_multiplier": 1.0}, "selection_clip_norm: noise needs a clipping norm"),
        ({"selection_strategy": "full", "selection_budget": "5"}, "selection_budget: the strategy full"),
        ({"lora_targets": ()}, "peft.targets"),
        ({"lora_targets": (",",)}, "peft.targets"),
        ({"lora_targets": ("all-linear", "q_proj")}, "all-linear stands alone"),
        ({"lora_targets": ("self_attn.q_proj",)}, "the last part of the module's name: q_proj"),
        ({"peft_method": "beft", "beft_targets": ("all-linear", "q_proj")}, "all-linear stands alone"),
        ({"peft_method": "ia3", "ia3_targets": ("auto", "q_proj")}, "auto stands alone"),
        ({"peft_method": "ia3", "ia3_feedforward": ("fc2",)}, "ia3_feedforward: fc2 is not among --ia3-targets"),
        ({"peft_method": "prompt-tuning", "num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"kmeans_iterations": 0, "selection_strategy": "federated-kmeans"}, "selection.strategy.kmeans_iterations"),
    ],
)
def test_mistakes_name_what_is_wrong(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        spec(**settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("q_proj,v_proj",), ("q_proj, v_proj",), ("q_proj,", "v_proj")]
)
def test_targets_may_be_divided_by_commas(targets: tuple[str, ...]) -> None:
    assert flat(spec(lora_targets=targets))["lora_targets"] == ("q_proj", "v_proj")


def test_every_setting_has_a_description_and_names_are_never_shared() -> None:
    settings = settings_of(RunSpec)
    assert all(setting.field.description for setting in settings)
    names = [setting.name for setting in settings]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("registry", [PEFT_SPECS, STRATEGY_SPECS, AGGREGATOR_SPECS, OPTIMIZER_SPECS])
def test_registries_say_the_names_that_the_classes_have(registry: dict[str, Any]) -> None:
    key = "method" if registry is PEFT_SPECS else "name"
    assert {name: getattr(variant(), key) for name, variant in registry.items()} == {name: name for name in registry}
    assert all(variant.summary for variant in registry.values())


LORA = lora_manifest({"q.lora_A.weight": (8, 40), "q.lora_B.weight": (20, 8)})
A, B = LORA.tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ((replace(A, shape=(1, 1 << 30)), B), r"not \(8, in\)"),
        ((A, replace(B, shape=(8, 20))), r"not \(out, 8\)"),
        ((replace(A, shape=(8, 40, 1)), B), r"not \(8, in\)"),
        ((replace(A, shape=(8, 1 << 22)), B), "4194304 features"),
        ((A,), "without the other factor"),
        ((A, replace(B, name="k.lora_B.weight")), "without the other factor"),
        ((replace(A, role="bias"), B), "no factor"),
        ((replace(A, name="q.bias"), B), "no factor"),
        ((A, replace(B, role="lora_A")), "no factor"),
        ((replace(A, initial=Initial.uniform(1000)), B), "another first value"),
        ((A, replace(B, initial=Initial.ones())), "another first value"),
        ((replace(A, scale_axis=None), B), "one scale per rank"),
    ],
)
def test_a_manifest_that_the_runs_lora_does_not_give_is_refused(tensors: tuple[TensorSpec, ...], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        spec().peft.check_manifest(AdapterManifest(tensors, "{}"))


def test_lora_of_the_runs_rank_is_taken_and_of_another_is_not() -> None:
    spec().peft.check_manifest(LORA)
    with pytest.raises(AdapterError, match=r"not \(4, in\)"):
        spec(lora_rank=4).peft.check_manifest(LORA)


@pytest.mark.parametrize(
    ("budget", "pool", "rows"),
    [
        ("auto", 10, None),
        ("7", 10, 7),
        ("70", 10, 10),
        ("1.5%", 200, 3),
        ("1.5%", 201, 4),
        ("100%", 9, 9),
        ("1%", 0, 0),
    ],
)
def test_budgets(budget: str, pool: int, rows: int | None) -> None:
    assert budget_rows(budget, pool) == rows


def test_only_full_and_the_papers_own_rule_have_no_budget() -> None:
    found = {name: spec(selection_strategy=name).selection.budget_of(1000) for name in STRATEGY_SPECS}
    assert found == {name: None if name in ("full", "fedhds") else 15 for name in STRATEGY_SPECS}
    given = spec(selection_strategy="fedhds", selection_budget="2%").selection.budget_of(1000)
    assert given == 20


def test_a_quorum_is_a_count_or_a_share_and_at_least_one() -> None:
    quorums = [spec(quorum=quorum).rounds.quorum_of(10) for quorum in ("3", "80%", "1%", "75.5%")]
    assert quorums == [3, 8, 1, 8]


def test_the_global_adapter_is_never_quantized() -> None:
    found = {dtype: spec(wire_dtype=dtype).aggregation.adapter_dtype for dtype in ("float32", "bfloat16", "int8")}
    assert found == {"float32": "float32", "bfloat16": "bfloat16", "int8": "float32"}
    assert get_args(WireDtype) == tuple(CODECS)


class TestStrategies:
    facts: ClassVar = {
        "full": (False, None),
        "random": (False, None),
        "fedhds": (False, "client"),
        "fedhds-aligned": (True, "client"),
        "federated-kmeans": (True, "example"),
        "target-features": (True, "example"),
        "target-gradients": (True, "example"),
    }

    def test_space_and_privacy_unit(self) -> None:
        assert {name: (item.shared_space, item.privacy_unit) for name, item in STRATEGY_SPECS.items()} == self.facts

    def test_releases_of_one_selection(self) -> None:
        made = {name: spec(selection_strategy=name, released_centroids=8) for name in STRATEGY_SPECS}
        found = {name: each.selection.strategy.releases(each) for name, each in made.items()}
        kmeans = splitting_passes(8) + FederatedKMeansSpec().kmeans_iterations + 1
        assert kmeans == total_passes(8, 5) == 12
        assert found == dict.fromkeys(STRATEGY_SPECS, 1) | {"full": 0, "random": 0, "federated-kmeans": kmeans}
        # A filter is a release more, whatever the strategy is.
        filtered = {name: each.replace(selection_filters="length,alignment") for name, each in made.items()}
        assert {name: each.selection.releases(each) for name, each in filtered.items()} == {
            name: count + 2 for name, count in found.items()
        }

    def test_the_model_card_says_what_was_released_and_how(self) -> None:
        noise = {"selection_clip_norm": 1.5, "selection_noise_multiplier": 0.5}
        plain = {name: spec(selection_strategy=name) for name in STRATEGY_SPECS}
        noised = {name: spec(selection_strategy=name, **noise) for name in STRATEGY_SPECS}
        notes = {name: each.selection.strategy.privacy_note(each) for name, each in plain.items()}
        assert notes["full"] == notes["random"] == ""
        assert notes["fedhds"].startswith("Released cluster centroids carried no noise: no differential-privacy")
        assert notes["federated-kmeans"].startswith("Released sums and counts over clusters of features carried no")
        notes = {name: each.selection.strategy.privacy_note(each) for name, each in noised.items()}
        assert notes["full"] == notes["random"] == ""
        assert notes["fedhds-aligned"] == (
            "Released centroids were clipped to L2 norm 1.5 and noised (Gaussian, noise multiplier 0.5); every site's "
            "own ledger states the client-level epsilon at delta 1e-05."
        )
        assert notes["federated-kmeans"] == (
            "Rows' features were clipped to L2 norm 1.5 and their sums and counts noised (Gaussian, noise multiplier "
            "0.5); every site's own ledger states the example-level epsilon at delta 1e-05."
        )
