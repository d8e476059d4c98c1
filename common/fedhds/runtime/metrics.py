"""Numbers for Prometheus: what is read off a program's state when it is asked, beside what the program has counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

# One observation for every second in which the loop was free; the last bounds are those of a probe's timeout.
LOOP_LAG = Histogram(
    "fedhds_event_loop_lag_seconds",
    "How much later than asked for the event loop woke up, observed once a second.",
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30),
)
Counted = Counter | Gauge | Histogram


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that is read off the state at the time of the scrape, with its name, kind, meaning and labels."""

    name: str
    kind: Literal["gauge", "counter"]
    meaning: str
    labels: tuple[str, ...] = ()

    def of(self, value: float | Mapping[str, float] | Mapping[tuple[str, ...], float] | None) -> Metric:
        """The value, or one per label's value (a tuple of them for several labels); None: nothing to tell."""
        make = GaugeMetricFamily if self.kind == "gauge" else CounterMetricFamily
        family = make(self.name, self.meaning, labels=self.labels)
        if isinstance(value, Mapping):
            for key, number in value.items():
                family.add_metric((key,) if isinstance(key, str) else key, number)
        elif value is not None:
            family.add_metric((), value)
        return family


@dataclass(frozen=True)
class _Scrape(Collector):
    families: Iterable[Metric]

    def collect(self) -> Iterable[Metric]:
        yield from REGISTRY.collect()
        yield from self.families


def exposition(families: Iterable[Metric], accept: str) -> tuple[bytes, str]:
    """What was counted, the process's own figures and `families`, in a format of the Accept header; its media type."""
    encode, media_type = choose_encoder(accept)
    return encode(_Scrape(families)), media_type


def reference(measures: Iterable[Measure], counted: Iterable[Counted]) -> str:
    """The metrics as a Markdown table, in the order of their names."""
    rows: dict[str, tuple[str, Sequence[str], str]] = {
        measure.name: (measure.kind, measure.labels, measure.meaning) for measure in measures
    }
    for metric in counted:
        (family,) = metric.describe()
        name = family.name + "_total" * (family.type == "counter")
        rows[name] = (family.type, metric._labelnames, family.documentation)
    lines = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in labels)} | {meaning} |"
        for name, (kind, labels, meaning) in sorted(rows.items())
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "| --- | --- | --- | --- |", *lines]) + "\n"
