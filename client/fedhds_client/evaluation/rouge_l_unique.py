"""Rouge-L as the PyPI package `rouge` 1.0.1 computes it, with which FedHDS was measured.

It is not that of `rouge-score`: case and punctuation count, a text is cut into sentences at full stops, and both the
common words of all pairs of sentences and the lengths are counted over different words. Texts whose words repeat score
higher. The package itself recurses once for each word, and ends with an error on long answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedhds_client.evaluation.base import EvaluatedBatch, Metric
from fedhds_client.evaluation.rouge_l import said


class RougeLUnique(Metric):
    """From 0 to 1; of several references the best one counts. Thoughts are no part of an answer."""

    def measure(self, batch: EvaluatedBatch) -> tuple[float, float]:
        pairs = zip(batch.answers, batch.rows, strict=True)
        scores = (
            max(rouge_l_unique(said(answer), said(text)) for text in row.references or (row.response,))
            for answer, row in pairs
        )
        return sum(scores), len(batch.rows)


def rouge_l_unique(answer: str, reference: str) -> float:
    """F1 of the package's `rouge-l`; 0 for an answer or a reference that has no sentence."""
    ours, theirs = _sentences(answer), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common: set[str] = set()
    for sentence in theirs:
        for own in ours:
            common |= _common_words(sentence, own)
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2 * (precision * recall / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; one of spaces alone has an empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(reference: Sequence[str], answer: Sequence[str]) -> set[str]:
    """The words of the longest common subsequence that the package finds: of equal ones, it drops the answer's end."""
    lengths = [[0] * (len(answer) + 1)]
    for word in reference:
        above, row = lengths[-1], [0]
        for column, other in enumerate(answer):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    words, i, j = set(), len(reference), len(answer)
    while i and j:
        if reference[i - 1] == answer[j - 1]:
            words.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
