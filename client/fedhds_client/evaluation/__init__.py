"""Evaluation on held-out rows: what is measured, one file per metric.

A new metric is a file here and its entry below; `fedhds.evaluation.METRICS` may give it a label and bounds.
"""

from fedhds_client.evaluation.base import EvaluatedBatch, EvaluationSums, Metric
from fedhds_client.evaluation.length import AnswerTokens
from fedhds_client.evaluation.loss import Loss
from fedhds_client.evaluation.rouge_l import RougeL
from fedhds_client.evaluation.rouge_l_unique import RougeLUnique

METRICS: dict[str, Metric] = {
    "loss": Loss(),
    "rouge_l": RougeL(),
    "rouge_l_unique": RougeLUnique(),
    "answer_tokens": AnswerTokens(),
}

__all__ = ["METRICS", "EvaluatedBatch", "EvaluationSums", "Metric"]
