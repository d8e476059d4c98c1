"""Rows of a wanted task: whose they are, how many there must be, and that no evaluation measures them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedhds.errors import SettingsError
from fedhds.privacy.accountant import Cost
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from tests.support.tiny import write_rows


def opened(stack: ExitStack, folder: Path, **settings: Any) -> list[Site]:
    return open_sites(
        ClientSettings(state=folder / "state", ledger=folder / "ledger.db", out=folder / "out", **settings), None, stack
    )


def test_the_first_site_has_the_target_rows_and_the_ledger_keeps_them_apart(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"cats": 12})
    others = write_rows(tmp_path / "b.jsonl", {"mice": 12})
    wanted = write_rows(tmp_path / "wanted.jsonl", {"dogs": 6})
    with ExitStack() as stack:
        first, second = opened(stack, tmp_path, data=(rows, others), target_data=wanted)
        assert first.target is not None
        assert (len(first.target), first.rows, second.target) == (6, 12, None)
        assert first.target_account.ledger.path == first.account.ledger.path
        # What is released of target rows is nothing that training rows have lost.
        first.target_account.record(
            b"means",
            run_id="r",
            task_id="select/0/a",
            cost=Cost(0.0),
            sensitivity=None,
            clip_norm=0.0,
            released=1,
            dimension=4,
            delta=1e-5,
        )
        assert [entry.rows for entry in first.target_account.entries()] == [6]
        assert first.account.entries() == second.account.entries() == []


def test_a_row_that_is_reported_is_no_target(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"cats": 12})
    reported = write_rows(tmp_path / "e.jsonl", {"mice": 5, "dogs": 6})
    wanted = write_rows(tmp_path / "wanted.jsonl", {"birds": 3, "dogs": 6})
    with (
        ExitStack() as stack,
        pytest.raises(SettingsError, match=r"--target-data: .* 6 of .*, the first in line 4, are"),
    ):
        opened(stack, tmp_path, data=(rows,), target_data=wanted, eval_data=reported)


def test_a_mean_over_few_rows_needs_consent(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"cats": 12})
    wanted = write_rows(tmp_path / "wanted.jsonl", {"dogs": 4})
    with ExitStack() as stack, pytest.raises(SettingsError, match="--target-data: has 4 rows, and a mean over so few"):
        opened(stack, tmp_path, data=(rows,), target_data=wanted)


def test_who_looks_for_rows_has_some(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="target_data: only a site with rows to train on"):
        ClientSettings(eval_data=tmp_path / "e.jsonl", target_data=tmp_path / "t.jsonl")
