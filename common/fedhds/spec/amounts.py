"""Amounts as people write them, a count or a share of a whole, and the largest count."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator

# Of sites and rows: far more than any run has, and what every integer type on the way holds.
MAX_COUNT = 2**31 - 1
# What a site is asked for is bounded where its memory or time follow from it: a coordinator may mean harm.
MAX_ROUNDS = 10**6
MAX_EPOCHS = 10**4
MAX_STEPS = 10**6
MAX_BATCH = 1 << 14
MAX_TOKENS = 1 << 20
# Characters of a path or a name.
MAX_NAME = 1000

_COUNT_OR_SHARE = re.compile(r"[1-9]\d{0,17}|(\d+(?:\.\d+)?)%", re.ASCII)


def budget_rows(budget: str, pool: int) -> int | None:
    """Rows that `budget` allows of `pool` rows: a count as it is, a share rounded up; None for "auto"."""
    if budget == "auto":
        return None
    if budget.endswith("%"):
        # A share is met by the next whole row; the small slack keeps 1.5 % of 200 at 3 despite binary floats.
        return min(pool, math.ceil(pool * float(budget[:-1]) / 100 - 1e-9))
    return min(pool, int(budget))


def _is_count_or_share(text: str) -> bool:
    match = _COUNT_OR_SHARE.fullmatch(text)
    return match is not None and (match[1] is None or 0 < float(match[1]) <= 100)


def is_share(text: str) -> bool:
    """Whether a text is a share as people write it."""
    return text.endswith("%") and _is_count_or_share(text)


def _check_budget(budget: str) -> str:
    if budget != "auto" and not _is_count_or_share(budget):
        raise ValueError("give auto, a count from 1, or a share up to 100%")
    return budget


def _check_quorum(quorum: str) -> str:
    if not _is_count_or_share(quorum):
        raise ValueError("give a count from 1 or a share up to 100%")
    return quorum


Budget = Annotated[str, AfterValidator(_check_budget)]
Quorum = Annotated[str, AfterValidator(_check_quorum)]
