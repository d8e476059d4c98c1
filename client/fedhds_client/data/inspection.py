"""What a run would see in a file of rows: which it can use, how long they are, and which of their tokens it trains."""

from __future__ import annotations

import copy
import logging
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fedhds.spec import PromptFormat
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.data.shard import read_rows

MAX_REFUSALS = 10
_NO_LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Part:
    """Neighboring tokens of one kind, as text."""

    text: str
    loss: bool
    """They are trained."""
    end: bool
    """They end an answer, and generation."""


@dataclass(frozen=True)
class RenderedRow:
    """A row as the run sees it."""

    line: int
    tokens: int
    left_out: int
    """Tokens beyond these that the longest length cuts off."""
    loss_tokens: int
    ended: bool
    """Whether a token ends the last answer."""
    parts: list[Part]


@dataclass
class Inspection:
    """All about one file; lengths are in tokens, before a row is cut."""

    prompt_format: str
    """chat or alpaca."""
    notes: list[str] = field(default_factory=list)
    """What the chat template does that training cannot follow."""
    formats: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    """Refused rows by reason."""
    refusals: list[tuple[int, str]] = field(default_factory=list)
    """Line (of a list or table: number, from 1) and reason of the first refused rows."""
    usable_with_alpaca: int = 0
    """Of the refused rows, those that the prompt format alpaca takes."""
    truncated: int = 0
    cut_answers: int = 0
    """Of the truncated rows, those that lose a part of their last answer."""
    rendered: list[RenderedRow] = field(default_factory=list)

    @property
    def usable(self) -> int:
        """Rows that a run can use."""
        return len(self.lengths)


def inspect(
    path: Path,
    tokenizer: Any,
    *,
    max_length: int,
    prompt_format: PromptFormat,
    rows: int,
    progress: Callable[[int], None] = lambda count: None,
) -> Inspection:
    """Reads a whole file as a site does, and renders its first `rows` usable rows; `progress` gets the rows so far.

    Raises DataError for a file that cannot be read, ModelError for a prompt format that the tokenizer does not have.
    """
    chat = bool(tokenizer.chat_template) and prompt_format != "alpaca"
    result = Inspection("chat" if chat else "alpaca")
    with _warnings(result.notes):
        prompter = Prompter(tokenizer, max_length=max_length, prompt_format=prompt_format)
        whole = copy.copy(prompter)
        whole.max_length = _NO_LIMIT
        for line, form, content in read_rows(path):
            try:
                if isinstance(content, BadRow):
                    raise content
                row = Row.from_content(result.usable, content)
                full = whole.encode(row)
            except BadRow as fault:
                result.refused += 1
                result.usable_with_alpaca += not isinstance(content, BadRow) and bool(prompter.other_format(row))
                result.reasons[str(fault)] += 1
                if len(result.refusals) < MAX_REFUSALS:
                    result.refusals.append((line, str(fault)))
            else:
                result.formats[form] += 1
                result.lengths.append(len(full.input_ids))
                encoded = prompter.encode(row) if len(full.input_ids) > max_length else full
                result.truncated += encoded.truncated
                result.cut_answers += sum(encoded.last_answer().loss) < sum(full.last_answer().loss)
                if len(result.rendered) < rows:
                    result.rendered.append(_rendered(tokenizer, prompter, line, encoded, len(full.input_ids)))
            progress(result.usable + result.refused)
    return result


def histogram(lengths: Sequence[int], mark: int) -> list[tuple[int, int, int]]:
    """Bins (first, last, rows) from the shortest to the longest, the wider the longer; one ends at `mark` if it can."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    edges, edge = {mark}, 8
    while edge < 2 * high:
        edges |= {edge, edge * 3 // 2}
        edge *= 2
    lasts = sorted(edges)
    counts = Counter(bisect_left(lasts, length) for length in lengths)
    bins = range(bisect_left(lasts, low), bisect_left(lasts, high) + 1)
    return [(lasts[index - 1] + 1 if index else 1, lasts[index], counts[index]) for index in bins]


def median(lengths: Sequence[int]) -> int | None:
    """The lower median; None of nothing."""
    return sorted(lengths)[(len(lengths) - 1) // 2] if lengths else None


def _rendered(tokenizer: Any, prompter: Prompter, line: int, encoded: Encoded, tokens: int) -> RenderedRow:
    ids = encoded.input_ids
    kinds = [(loss, loss and token == prompter.end_id) for token, loss in zip(ids, encoded.loss, strict=True)]
    parts, begin, before = [], 0, ""
    for (loss, end), group in groupby(kinds):
        last = begin + len(list(group))
        # Alone, a token may be decoded otherwise than behind others: without a space, or as half a character.
        text = _decoded(tokenizer, ids[:last])
        own = text[len(before) :] if text.startswith(before) else _decoded(tokenizer, ids[begin:last])
        parts.append(Part(own, loss, end))
        begin, before = last, text
    return RenderedRow(line, len(ids), tokens - len(ids), sum(encoded.loss), encoded.end is not None, parts)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@contextmanager
def _warnings(notes: list[str]) -> Iterator[None]:
    """Collects what is logged meanwhile about the template, once each."""

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage() not in notes:
                notes.append(record.getMessage())

    logger, collector = logging.getLogger("fedhds_client.data"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
