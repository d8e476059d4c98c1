"""The metrics of an evaluation as both sides know them: what a value means, and between which bounds it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MetricInfo:
    """A mean that sites measure on held-out rows; the coordinator shows metrics without such an entry by name."""

    label: str
    """With its unit, for tables."""
    low: float
    high: float


METRICS: dict[str, MetricInfo] = {
    # Nats per response token that no model gives; what is summed over sites and rounds stays finite below it.
    "loss": MetricInfo("loss (nats per response token)", -1e9, 1e9),
    "rouge_l": MetricInfo("Rouge-L F1", 0.0, 1.0),
    "rouge_l_unique": MetricInfo("Rouge-L F1 of unique words", 0.0, 1.0),
    "answer_tokens": MetricInfo("tokens per answer", 0.0, 1e9),
}


def label_of(metric: str) -> str:
    """What to call a metric in a table."""
    return METRICS[metric].label if metric in METRICS else metric
