"""Settings with several values, and the runs that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from fedhds.errors import SettingsError
from fedhds.settings import flat
from fedhds.settings.loader import read
from fedhds_server.simulation.settings import simulation_settings
from fedhds_server.simulation.sweep import Point, points

BASE = ("--model=m", "--data=rows.jsonl")


def plan(*flags: str, config: str = "", folder: Path | None = None) -> list[Point]:
    if folder:
        (folder / "sweep.yaml").write_text(config)
        flags = (*flags, f"--config={folder / 'sweep.yaml'}")
    settings = simulation_settings()
    arguments: Sequence[str] = [*BASE, *flags]
    given = read(settings, program="p", description="", arguments=arguments, environment={}, sweeps=True)
    return points(settings, given)


def test_one_value_each_is_one_run() -> None:
    [point] = plan("--seed=7", "--lora-targets", "q_proj", "v_proj", "--model-license=MIT, with care")
    run = point.settings.coordinator.run
    assert (run.seed, run.rounds.count, flat(run)["lora_targets"]) == (7, 10, ("q_proj", "v_proj"))
    assert (run.model.license, point.label, point.swept) == ("MIT, with care", "run", {})


def test_several_values_make_every_combination_with_seeds_outermost() -> None:
    runs = plan("--seed=1,2", "--selection-strategy=random,fedhds", "--rounds=3")
    assert [point.label for point in runs] == [
        "selection-strategy=random,seed=1",
        "selection-strategy=fedhds,seed=1",
        "selection-strategy=random,seed=2",
        "selection-strategy=fedhds,seed=2",
    ]
    assert [point.settings.coordinator.run.seed for point in runs] == [1, 1, 2, 2]
    assert [point.settings.coordinator.run.selection.strategy.name for point in runs[:2]] == ["random", "fedhds"]


def test_a_parameter_of_one_strategy_counts_in_its_runs_alone() -> None:
    runs = plan("--selection-strategy=random,fedhds", "--min-cluster-size=3,4")
    assert [dict(point.swept) for point in runs] == [
        {"selection_strategy": "random"},
        {"selection_strategy": "fedhds", "min_cluster_size": "3"},
        {"selection_strategy": "fedhds", "min_cluster_size": "4"},
    ]


def test_a_strategy_that_takes_all_rows_has_one_run_whatever_the_budgets() -> None:
    runs = plan("--selection-strategy=random,full", "--selection-budget=1%,2%")
    budgets = [(dict(point.swept), point.settings.coordinator.run.selection.budget) for point in runs]
    assert budgets == [
        ({"selection_strategy": "random", "selection_budget": "1%"}, "1%"),
        ({"selection_strategy": "random", "selection_budget": "2%"}, "2%"),
        ({"selection_strategy": "full"}, "auto"),
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed=1,1",), "--seed: has a value twice"),
        (("--processes=1,2",), "--processes: takes one value"),
        (("--selection-strategy=random,none",), "--selection-strategy"),
        (("--selection-strategy=full", "--selection-budget=1%"), "--selection-budget"),
        (("--rounds=0,-1",), "--rounds"),
        (("--selection-strategy=random", "--min-cluster-size=3"), "--min-cluster-size"),
        (("--selection-strategy=random,full", "--min-cluster-size=3"), "--min-cluster-size"),
        (("--shards=s",), "--data: give either --data, or --shards"),
    ],
)
def test_mistakes_name_their_flag(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(*flags)
    assert words in str(caught.value)


def test_yaml_lists_are_several_values(tmp_path: Path) -> None:
    runs = plan(config="seed: [1, 2]\nlora_targets: [q_proj, v_proj]\nalpha: [0.1, 5]\n", folder=tmp_path)
    assert [(point.settings.coordinator.run.seed, point.settings.alpha) for point in runs] == [
        *((1, 0.1), (1, 5.0), (2, 0.1), (2, 5.0)),
    ]
    assert {flat(point.settings.coordinator.run)["lora_targets"] for point in runs} == {("q_proj", "v_proj")}


def test_settings_that_a_simulation_makes_itself_are_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("listen", "run-folder", "tls-key", "min-sites"):
        with pytest.raises(SystemExit):
            plan(f"--{name}=x")
        assert "unrecognized arguments" in capsys.readouterr().err
