"""`fedhds privacy`: what a planned run would cost, and what was spent, as tables and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedhds.cli.toolbox import app
from fedhds.errors import SettingsError, UsageError
from fedhds.privacy.accountant import Cost, epsilon_of
from fedhds.privacy.ledger import Ledger
from fedhds.privacy.mechanisms import gaussian_epsilon
from fedhds.spec import RunSpec

RUN = ("--model", "m", "--rounds", "3", "--batch-size", "32", "--selection-strategy", "full")


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["privacy", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def planned(*arguments: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(printed("--rows", "700", "--json", *arguments))
    return read


def test_a_plan_composes_all_that_would_leave() -> None:
    plan = planned(*RUN, "--dp-noise-multiplier", "1.0", "--delta", "1e-4")
    rows, adapters = plan["releases"]
    assert (rows["release"], rows["cost"]["noise_multiplier"]) == ("number of rows", 10.0)
    assert adapters["cost"] == {"noise_multiplier": 1.0, "sample_rate": 32 / 700, "steps": 66, "replaced": False}
    assert plan["delta"] == 1e-4
    assert plan["epsilon"] == {"example": epsilon_of([Cost(10.0), Cost(1.0, 32 / 700, 66)], delta=1e-4)}
    assert plan["notes"] == ["noise on both factors of LoRA multiplies: --aggregator ffa or alternating keep it linear"]
    text = printed("--rows", "700", *RUN, "--dp-noise-multiplier", "1.0", "--aggregator", "ffa")
    assert "adapters        example  1      0.04571  66" in text
    assert "multiplies" not in text


def test_units_are_told_apart_and_training_without_noise_is_said() -> None:
    noise = ("--selection-clip-norm", "1", "--selection-noise-multiplier", "2")
    plan = planned(*RUN[:-1], "fedhds-aligned", "--selection-schedule", "per-round", *noise)
    expected = gaussian_epsilon(noise_multiplier=2.0, delta=1e-5, releases=3)
    assert plan["epsilon"] == {"client": pytest.approx(expected)}
    assert plan["notes"] == ["adapters are trained without noise: no epsilon covers them"]
    assert planned(*RUN[:-1], "fedhds")["epsilon"] == {"client": None}


def test_a_plan_reads_the_specification_of_a_run(tmp_path: Path) -> None:
    spec = RunSpec.of(
        model="m", rounds=3, batch_size=32, selection_strategy="full", dp_noise_multiplier=1.0, delta=1e-4
    )
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"spec": spec.model_dump(mode="json")}))
    assert planned("--run", str(file)) == planned(*RUN, "--dp-noise-multiplier", "1.0", "--delta", "1e-4")


def test_what_was_spent_is_told_by_shard_and_unit(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    for name, rows, noise in (("a", range(3), 2.0), ("b", range(1, 4), 4.0), ("c", [9], 0.0)):
        digests = [bytes([row]) * 32 for row in rows]
        Ledger(path).account(name * 20, lambda digests=digests: digests).record(  # type: ignore[misc]
            b"", run_id=name, task_id="t", cost=Cost(noise), sensitivity=None, clip_norm=0, released=1, dimension=1,
            delta=1e-5, unit="example",
        )  # fmt: skip
    read = json.loads(printed("--ledger", str(path), "--json"))
    # Two of three rows were in both.
    both = gaussian_epsilon(noise_multiplier=(1 / 4 + 1 / 16) ** -0.5, delta=1e-5)
    assert [shard["rows"] for shard in read["shards"]] == [3, 3, 1]
    assert [shard["releases"] for shard in read["shards"]] == [2, 2, 1]
    for shard in read["shards"][:2]:
        assert shard["epsilon"] == {"client": 0.0, "example": pytest.approx(both)}
    assert read["shards"][2]["epsilon"] == {"client": None, "example": None}
    text = printed("--ledger", str(path))
    assert "cccccccccccc  1         1     inf     inf" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ledger", "/nowhere/ledger.db"), "there is no ledger /nowhere/ledger.db"),
        (("--delta", "1"), "--delta 1 is not between 0 and 1"),
        (("--model", "m"), "a planned run needs --rows"),
        (("--rows", "5", "--run", "x", "--model", "m"), "drop --model m"),
        (("--rows", "5", "--run", "/nowhere"), "has no run's specification"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        printed(*arguments)
    assert words in str(caught.value)


def test_settings_that_do_not_go_together_are_refused_as_at_the_coordinator() -> None:
    with pytest.raises(SettingsError, match="DP-SGD cannot train it"):
        planned(*RUN, "--epsilon", "8", "--peft-method", "ia3")
