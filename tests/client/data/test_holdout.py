"""Rows that a shard holds out: a share drawn by a seed, apart from those that train."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedhds.errors import DataError, SettingsError
from fedhds_client.data.shard import Shard
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from tests.support.tiny import write_rows


@given(st.lists(st.integers(0, 30), min_size=2, max_size=40), st.floats(0.05, 0.9), st.integers(0, 9))
def test_a_holdout_takes_a_share_of_the_rows_and_leaves_the_others(numbers: list[int], share: float, seed: int) -> None:
    rows = [{"instruction": f"i{number}", "response": "r"} for number in numbers]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with Shard.open(path) as whole, Shard.open(path) as shard:
            try:
                part = shard.hold_out(share, seed)
            except DataError:
                assert len(whole) == len(shard)
                return
            before = [row.instruction for row in whole]
            mine, theirs = [row.instruction for row in shard], [row.instruction for row in part]
            assert sorted([*mine, *theirs]) == sorted(before)
            # Equal rows are on one side.
            assert not set(mine) & set(theirs)
            assert [row.id for row in part] == list(range(len(part)))
            assert (mine, theirs) == tuple([name for name in before if name in side] for side in (mine, theirs))
            assert len(part) >= max(1, round(share * len(whole)))
            assert len(part) - max(1, round(share * len(whole))) < max(before.count(name) for name in theirs)
            path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
            with Shard.open(path) as backwards, backwards.hold_out(share, seed) as same:
                assert sorted(row.digest for row in same) == sorted(row.digest for row in part)
            part.close()


def test_a_holdout_depends_on_its_seed_and_counts_for_itself(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", {"cats": 20, "dogs": 20})
    drawn = []
    for seed in (0, 0, 1):
        with Shard.open(path) as shard, shard.hold_out(0.25, seed) as part:
            drawn.append([row.instruction for row in part])
            assert shard.categories + part.categories == {"cats": 20, "dogs": 20}
            assert shard.digest != part.digest
            assert (len(part), len(shard)) == (10, 30)
    assert drawn[0] == drawn[1] != drawn[2]


def test_shared_rows_are_named_by_line(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": f"i{number}", "response": "r"}) + "\n" for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text(lines[3] + lines[1])
    with Shard.open(tmp_path / "a.jsonl") as a, Shard.open(tmp_path / "b.jsonl") as b:
        assert (a.shared(b), b.shared(a)) == ([3, 7], [1, 2])


def _opened(stack: ExitStack, folder: Path, **settings: Any) -> list[Site]:
    own = ClientSettings(state=folder / "state", out=folder / "out", name=("ward",), **settings)
    return open_sites(own, None, stack)


def test_a_site_validates_on_rows_that_do_not_train(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"cats": 40})
    others = write_rows(tmp_path / "v.jsonl", {"dogs": 7})
    with ExitStack() as stack:
        (site,) = _opened(stack, tmp_path, data=(rows,), holdout=0.25)
        assert site.validation
        assert (site.rows, len(site.validation), site.held_out) == (30, 10, None)
        assert site.shard
        assert not site.validation.shared(site.shard)
    with ExitStack() as stack:
        (site,) = _opened(stack, tmp_path, data=(rows,), validation_data=others)
        assert (site.rows, site.validation and len(site.validation)) == (40, 7)
    with ExitStack() as stack:
        (site,) = _opened(stack, tmp_path, validation_data=others)
        assert (site.rows, site.evaluates, site.validation and len(site.validation)) == (0, False, 7)


def test_a_row_that_is_reported_must_not_choose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = write_rows(tmp_path / "a.jsonl", {"cats": 40})
    both = write_rows(tmp_path / "e.jsonl", {"dogs": 9, "cats": 40})
    with ExitStack() as stack, pytest.raises(SettingsError, match=r"--holdout: .* 4 of .*a\.jsonl, the first in line"):
        _opened(stack, tmp_path, data=(rows,), eval_data=both, holdout=0.1)
    with ExitStack() as stack, pytest.raises(SettingsError, match=r"--validation-data: .* 40 of .* line 1,"):
        _opened(stack, tmp_path, eval_data=both, validation_data=rows)
    with ExitStack() as stack:
        _opened(stack, tmp_path, data=(rows,), validation_data=both)
    assert "40 rows of" in caplog.text


def test_few_rows_do_not_validate(tmp_path: Path) -> None:
    rows, few = write_rows(tmp_path / "a.jsonl", {"cats": 40}), write_rows(tmp_path / "v.jsonl", {"dogs": 4})
    with ExitStack() as stack, pytest.raises(SettingsError, match="--validation-data: has 4 rows"):
        _opened(stack, tmp_path, data=(rows,), validation_data=few)
    with ExitStack() as stack, pytest.raises(SettingsError, match="--holdout: has 2 rows"):
        _opened(stack, tmp_path, data=(rows,), holdout=0.05)
    with ExitStack() as stack, pytest.raises(DataError, match="leaves no row to train on"):
        _opened(stack, tmp_path, data=(few,), holdout=0.9)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"data": ("a.jsonl",), "holdout": 0.1, "validation_data": "v.jsonl"}, "drop one of the two"),
        ({"eval_data": "e.jsonl", "holdout": 0.1}, "takes a share of --data"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ClientSettings(**settings)
