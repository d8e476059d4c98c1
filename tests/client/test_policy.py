"""The site's policy: strict reading, every rule on its own, and limits on the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import PolicyError, SettingsError
from fedhds.spec import RunSpec
from fedhds_client.policy import MAX_DELTA, SitePolicy
from fedhds_client.settings import ClientSettings

NOISED = {"selection_strategy": "full", "epsilon": 4.0, "delta": 1e-6}


def spec_of(**fields: Any) -> RunSpec:
    return RunSpec.of(**{"model": "m", "rounds": 3, "selection_strategy": "full"} | fields)


def read(folder: Path, text: str, **flags: Any) -> SitePolicy:
    file = folder / "policy.yaml"
    file.write_text(text)
    return ClientSettings(data=(Path("a.jsonl"),), state=folder, policy=file, **flags).rules


def test_rules_come_from_the_file_and_from_flags(tmp_path: Path) -> None:
    policy = read(tmp_path, "models: [m, n]\nmax-rounds: 5\nmin_training_noise: 0.5\n", min_cluster_rows=7)
    assert (policy.models, policy.max_rounds, policy.min_training_noise, policy.min_cluster_rows) == (
        ("m", "n"),
        5,
        0.5,
        7,
    )
    # Flags alone are a policy, too.
    alone = ClientSettings(data=(Path("a.jsonl"),), state=tmp_path, allow_exact_kmeans_sums=True).rules
    assert alone == SitePolicy(allow_exact_kmeans_sums=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modles: [m]\n", "modles: there is no such rule; there are models, allow-feature-model"),
        ("max-rounds: 0\n", "max-rounds: Input should be greater than or equal to 1"),
        ("max-rounds: many\n", "max-rounds: Input should be a valid integer"),
        ("models: m\n", "models: Input should be a valid tuple"),
        ("max-epsilon: .inf\n", "max-epsilon: Input should be a finite number"),
        ("max-rounds: 1\nmax_rounds: 2\n", "max_rounds is there twice"),
        ("- models\n", "is no mapping of rules"),
        ("a: b: c\n", "is no YAML"),
        ("", "is no mapping of rules"),
    ],
)
def test_a_file_that_is_wrong_names_the_line_at_fault(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, text)
    assert words in str(caught.value)
    assert "--policy" in str(caught.value)
    assert "policy.yaml" in str(caught.value)


def test_a_missing_file_and_a_rule_in_two_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--policy: cannot read"):
        ClientSettings(data=(Path("a.jsonl"),), state=tmp_path, policy=tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match=r"--min-cluster-rows: the policy .* has this rule, too"):
        read(tmp_path, "min-cluster-rows: 9\n", min_cluster_rows=1)


@pytest.mark.parametrize(
    ("rules", "broken", "within", "rule"),
    [
        ({"models": ("n",)}, {}, {"model": "n"}, "models"),
        ({"peft_methods": ("lora",)}, {"peft_method": "ia3"}, {}, "peft-methods"),
        ({"strategies": ("full",)}, {"selection_strategy": "random"}, {}, "strategies"),
        ({"aggregators": ("ffa",)}, {}, {"aggregator": "ffa"}, "aggregators"),
        ({"models": ()}, {}, None, "models"),
        ({"max_rounds": 3}, {"rounds": 4}, {}, "max-rounds"),
        ({"min_selection_noise": 1.0}, {"selection_strategy": "fedhds"}, {}, "min-selection-noise"),
        ({"min_training_noise": 1.0}, {}, NOISED, "min-training-noise"),
        ({"min_training_noise": 1.0}, {"dp_noise_multiplier": 0.9}, {"dp_noise_multiplier": 1.0}, "min-training-noise"),
        ({"max_epsilon": 5.0}, {}, NOISED, "max-epsilon"),
        ({"max_run_epsilon": 3.9}, NOISED, {**NOISED, "epsilon": 3.9}, "max-run-epsilon"),
        (
            {"max_run_epsilon": 9.0},
            {
                **NOISED,
                "selection_strategy": "federated-kmeans",
                "selection_clip_norm": 1.0,
                "selection_noise_multiplier": 0.5,
            },
            NOISED,
            "max-run-epsilon",
        ),
    ],
)
def test_a_run_outside_a_rule_is_refused_with_its_name(
    rules: dict[str, Any], broken: dict[str, Any], within: dict[str, Any] | None, rule: str
) -> None:
    policy = SitePolicy(**rules)
    with pytest.raises(PolicyError, match=f"the site's policy does not allow it: {rule}: ") as caught:
        policy.check_run(spec_of(**broken))
    assert caught.value.public_message == str(caught.value)
    if within is not None:
        policy.check_run(spec_of(**within))


def test_without_rules_everything_is_allowed_but_other_feature_models() -> None:
    SitePolicy().check_run(spec_of(rounds=1000, peft_method="ia3", selection_strategy="fedhds"))
    with pytest.raises(PolicyError, match="--allow-feature-model other"):
        SitePolicy().check_run(spec_of(selection_strategy="fedhds", feature_model="other"))
    SitePolicy(allow_feature_model=("other",)).check_run(spec_of(selection_strategy="fedhds", feature_model="other"))


def test_rounds_beyond_the_runs_or_the_sites_are_refused() -> None:
    SitePolicy().check_round(spec_of(), 3, 100)
    with pytest.raises(PolicyError, match="this is round 4 of a run that has 3"):
        SitePolicy().check_round(spec_of(), 4, 0)
    # Numbers may repeat; adapters are counted.
    SitePolicy(max_rounds=3).check_round(spec_of(), 1, 2)
    with pytest.raises(PolicyError, match="3 adapters of this site have left"):
        SitePolicy(max_rounds=3).check_round(spec_of(), 1, 3)


def test_limits_are_judged_at_a_delta_of_the_sites_own() -> None:
    policy = SitePolicy(max_epsilon=9.0, max_run_epsilon=3.0, selection_max_epsilon=2.0)
    limits = policy.limits(spec_of(**NOISED), "run")
    assert [(limit.epsilon, limit.run_id, limit.selection_only, limit.delta) for limit in limits] == [
        (2.0, "", True, 1e-6),
        (9.0, "", False, 1e-6),
        (3.0, "run", False, 1e-6),
    ]
    assert policy.delta(spec_of(epsilon=1.0, delta=0.5)) == MAX_DELTA
    assert SitePolicy().limits(spec_of(), "run") == ()
