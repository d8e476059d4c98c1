"""What a client's process tells of its sites."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.privacy.ledger import Ledger, Unit
from fedhds.runtime.metrics import exposition
from fedhds_client.counters import Activity
from fedhds_client.metrics import MEASURES, SiteMetrics


def site(folder: Path, name: str) -> Any:
    return SimpleNamespace(name=name, rows=3, held_out=None, ledger=Ledger(folder / f"{name}.jsonl"))


def release(made: Any, task: str, noise_multiplier: float, unit: Unit = "client") -> None:
    made.ledger.record(
        b"",
        run_id="r",
        task_id=task,
        noise_multiplier=noise_multiplier,
        sensitivity=1.0 if noise_multiplier else None,
        clip_norm=1.0,
        released=1,
        dimension=1,
        delta=1e-5,
        unit=unit,
    )


@pytest.fixture
def told(tmp_path: Path) -> Any:
    sites = [site(tmp_path, "a"), site(tmp_path, "b")]
    link = SimpleNamespace(bytes_sent=5, unanswered_since=None)
    activities = [(Activity.TRAIN, 0.0), (Activity.TRAIN, 0.25)]
    metrics = SiteMetrics(sites, link, lambda: activities)  # type: ignore[arg-type]

    def value(name: str, *labels: str) -> float:
        (found,) = [
            sample.value
            for family in metrics.families()
            for sample in family.samples
            if (sample.name, tuple(sample.labels.values())) == (name, labels)
        ]
        return float(found)

    return SimpleNamespace(sites=sites, link=link, metrics=metrics, activities=activities, value=value)


def test_epsilon_is_the_largest_of_the_ledgers_and_follows_them(told: Any) -> None:
    a, b = told.sites
    assert told.value("fedhds_client_epsilon", "client") == 0
    release(a, "1", 4.0)
    release(b, "1", 2.0)
    assert told.value("fedhds_client_epsilon", "client") == pytest.approx(b.ledger.spent(delta=1e-5))
    release(a, "2", 1.0)
    assert told.value("fedhds_client_epsilon", "client") == pytest.approx(a.ledger.spent(delta=1e-5))
    assert told.value("fedhds_client_epsilon", "example") == 0
    release(b, "2", 0.0)
    assert told.value("fedhds_client_epsilon", "client") == math.inf


def test_a_damaged_ledger_is_no_number_and_the_rest_is_told(told: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    assert math.isnan(told.value("fedhds_client_epsilon", "client"))
    assert told.value("fedhds_client_rows", "train") == 6


def test_activities_progress_and_the_link_are_told(told: Any) -> None:
    assert told.value("fedhds_client_sites", "train") == 2
    assert told.value("fedhds_client_task_progress", "train") == 0.25
    assert told.value("fedhds_client_connected") == 1
    assert not told.metrics.problems()
    told.link.unanswered_since = 1e-9
    told.activities[0] = (Activity.ENROLLING, 0.0)
    assert told.value("fedhds_client_connected") == 0
    assert told.value("fedhds_client_unanswered_seconds") > 0
    assert list(told.metrics.problems()) == ["link", "enrollment"]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0", "text/plain;version=0.0.4"])
def test_every_measure_is_exposed_in_every_format(told: Any, accept: str) -> None:
    content, media_type = exposition(told.metrics.families(), accept)
    assert media_type.startswith("application/openmetrics-text" if "openmetrics" in accept else "text/plain")
    for measure in MEASURES:
        assert f"# TYPE {measure.name.removesuffix('_total')}" in content.decode()
