"""Rows are judged with the prompt format that will render them, before a site registers them.

A chat template is a program that refuses roles and orders of turns; such a row would fail every task of its site.
"""

from __future__ import annotations

import logging

from fedhds.errors import DataError
from fedhds_client.computation import Cancelled, Control
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.data.shard import Shard

logger = logging.getLogger(__name__)

_SHOWN = 3


def judge(shard: Shard, prompter: Prompter, *, skip_bad_rows: bool, operator: str, control: Control) -> None:
    """Leaves out the rows that `prompter` refuses if bad rows are skipped; else raises DataError for the first one.

    It is an error, too, when no row remains. `operator` names, for the coordinator as well, who sets the prompt format.
    """
    others: list[str] = []

    def check(row: Row) -> None:
        if control.cancelled():
            raise Cancelled("the site stops")
        try:
            prompter.check(row)
        except BadRow:
            others.append(prompter.other_format(row)) if not others else None
            raise

    count, first = shard.leave_out(check, control.report)
    if not count:
        return
    line, reason = first[0]
    cure = f"; {operator} can set --prompt-format {others[0]}, which takes it" * bool(others[0])
    if not len(shard):
        text = f"none of its rows can be used with this prompt format; line {line}: {reason}{cure}"
        raise DataError(shard.path, text, public_reason=f"{reason}{cure}; all others are refused, too")
    if not skip_bad_rows:
        more = f" (with {count - 1} more rows)" * (count > 1)
        text = f"{reason}{more}; fix the row, or leave such rows out with --skip-bad-rows{cure}"
        raise DataError(shard.path, text, line, public_reason=f"{reason}{more}{cure}")
    lines = "; ".join(f"line {line}: {reason}" for line, reason in first[:_SHOWN])
    text = "%s: %d of %d rows are left out (%s%s)"
    logger.warning(text, shard.path, count, count + len(shard), lines, cure)
