"""What a client's process exposes of its sites."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedhds.privacy.accountant import Cost
from fedhds.privacy.ledger import Ledger, Unit
from fedhds.runtime.metrics import exposition
from fedhds_client.counters import ENROLLING
from fedhds_client.metrics import MEASURES, SiteMetrics


def site(folder: Path, name: str) -> Any:
    return SimpleNamespace(
        name=name,
        rows=3,
        held_out=None,
        validation=None,
        account=Ledger(folder / "ledger.db").account(name, lambda: [name.encode()]),
    )


def release(made: Any, task: str, noise_multiplier: float, unit: Unit = "client") -> None:
    made.account.record(
        b"",
        run_id=made.name,
        task_id=task,
        cost=Cost(noise_multiplier),
        sensitivity=1.0 if noise_multiplier else None,
        clip_norm=1.0,
        released=1,
        dimension=1,
        delta=1e-5,
        unit=unit,
    )


@pytest.fixture
def process(tmp_path: Path) -> Any:
    sites = [site(tmp_path, "a"), site(tmp_path, "b")]
    client = SimpleNamespace(bytes_sent=5, unanswered_since=None)
    activities = [("train", 0.0), ("train", 0.25)]
    metrics = SiteMetrics(sites, client, lambda: activities)  # type: ignore[arg-type]

    def value(name: str, *labels: str) -> float:
        (number,) = [
            sample.value
            for family in metrics.families()
            for sample in family.samples
            if (sample.name, tuple(sample.labels.values())) == (name, labels)
        ]
        return float(number)

    return SimpleNamespace(sites=sites, client=client, metrics=metrics, activities=activities, value=value)


def test_epsilon_is_the_largest_of_the_ledgers_and_follows_them(process: Any) -> None:
    a, b = process.sites
    assert process.value("fedhds_client_epsilon", "client") == 0
    release(a, "1", 4.0)
    release(b, "1", 2.0)
    assert process.value("fedhds_client_epsilon", "client") == pytest.approx(b.account.spent(delta=1e-5))
    release(a, "2", 1.0)
    assert process.value("fedhds_client_epsilon", "client") == pytest.approx(a.account.spent(delta=1e-5))
    assert process.value("fedhds_client_epsilon", "example") == 0
    release(b, "2", 0.0)
    assert process.value("fedhds_client_epsilon", "client") == math.inf


def test_a_damaged_ledger_is_no_number_and_the_rest_is_exposed(process: Any, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("nonsense\n" * 1000)
    assert math.isnan(process.value("fedhds_client_epsilon", "client"))
    assert process.value("fedhds_client_rows", "train") == 6


def test_activities_progress_and_the_connection_are_exposed(process: Any) -> None:
    assert process.value("fedhds_client_sites", "train") == 2
    assert process.value("fedhds_client_task_progress", "train") == 0.25
    assert process.value("fedhds_client_connected") == 1
    assert not process.metrics.problems()
    process.client.unanswered_since = 1e-9
    process.activities[0] = (ENROLLING, 0.0)
    assert process.value("fedhds_client_connected") == 0
    assert process.value("fedhds_client_unanswered_seconds") > 0
    assert list(process.metrics.problems()) == ["link", "enrollment"]


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0", "text/plain;version=0.0.4"])
def test_every_measure_is_exposed_in_every_format(process: Any, accept: str) -> None:
    content, media_type = exposition(process.metrics.families(), accept)
    assert media_type.startswith("application/openmetrics-text" if "openmetrics" in accept else "text/plain")
    for measure in MEASURES:
        assert f"# TYPE {measure.name.removesuffix('_total')}" in content.decode()
