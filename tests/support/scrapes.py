"""What a daemon answers over HTTP, for tests of processes."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from tests.support.federation import PATIENCE_S, Daemon

FLAG = "--http=127.0.0.1:0"
Labels = tuple[tuple[str, str], ...]


class Scrape(NamedTuple):
    """One answer of /metrics."""

    named: set[str]
    """Every name of the HELP lines, also of metrics that have no sample now."""
    samples: dict[tuple[str, Labels], float]

    def __call__(self, name: str, **labels: str) -> float:
        """The value of a sample."""
        return self.samples[name, tuple(sorted(labels.items()))]


def get(daemon: Daemon, path: str, timeout_s: float = 20.0) -> tuple[int, str]:
    """Status and text of an answer."""
    daemon.wait_for("metrics at http")
    found = re.search(r"metrics at (\S+)/metrics", daemon.text)
    assert found
    try:
        with urllib.request.urlopen(found[1] + path, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scrape(daemon: Daemon) -> Scrape:
    """The daemon's metrics now."""
    status, text = get(daemon, "/metrics")
    assert status == 200
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Scrape(set(re.findall(r"^# HELP (\S+)", text, flags=re.MULTILINE)), samples)


def until(condition: Callable[[], object]) -> None:
    """Returns once `condition` holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
