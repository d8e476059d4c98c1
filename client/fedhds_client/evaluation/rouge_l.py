"""Rouge-L F1 of greedy answers (Lin 2004), the mean over rows."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from fedhds_client.evaluation.base import EvaluatedBatch, Metric


class RougeL(Metric):
    """From 0 to 1; of several references the best one counts. Thoughts are no part of an answer."""

    def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
        pairs = zip(batch.answers, batch.rows, strict=True)
        scores = (rouge_l(said(answer), [*map(said, row.references or (row.response,))]) for answer, row in pairs)
        return sum(scores), len(batch.rows)


def said(text: str) -> str:
    """What stands behind the thoughts of an answer."""
    return text.rpartition("</think>")[2]


class _Words:
    """Words in any script; rouge_score's own tokenizer knows a-z and 0-9 and finds nothing in Greek or Chinese.

    On ASCII text the two agree. Scripts without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) count by
    character, and so does Korean, whose particles stick to words.
    """

    _PATTERN = re.compile(
        r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
        r"|[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]+"
    )

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words."""
        composed = unicodedata.normalize("NFC", text.lower())
        # Combining marks belong to words, as Hindi's vowels do.
        characters = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in composed)
        return self._PATTERN.findall("".join(characters))


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F1 of an answer, the best over its references."""
    return max(float(_SCORER.score(reference, answer)["rougeL"].fmeasure) for reference in references)
