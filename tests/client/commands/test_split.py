"""`fedhds split`: files that hold every row once, a manifest that says what was done, and errors before any harm."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from fedhds import __version__
from fedhds.errors import DataError, UsageError
from fedhds_client.commands.split import split
from fedhds_client.data.row_formats import Row
from fedhds_client.data.shard import Shard
from tests.support.tiny import write_rows

TOPICS = {"cats": 60, "dogs": 50, "birds": 40}

app = typer.Typer()
app.command()(split)


def _split(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def _manifest(out: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _rows(file: Path) -> list[Row]:
    with Shard.open(file) as shard:
        return list(shard)


def _digests(out: Path) -> dict[str, list[str]]:
    return {file.name: [row.digest for row in _rows(file)] for file in sorted(out.glob("*.jsonl"))}


def _bytes(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A hundred and fifty rows of three categories."""
    return write_rows(tmp_path / "pool.jsonl", TOPICS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "shards"


@pytest.mark.parametrize("by", ["dirichlet", "category", "iid", "task"])
def test_every_row_goes_to_exactly_one_site(data: Path, out: Path, by: str) -> None:
    _split(data, "--out", out, "--sites", 3, "--by", by)
    dealt = _digests(out)
    assert list(dealt) == ["site-00.jsonl", "site-01.jsonl", "site-02.jsonl"]
    assert Counter(digest for rows in dealt.values() for digest in rows) == Counter(row.digest for row in _rows(data))
    assert set(_bytes(out)) == {*dealt, "manifest.json"}


def test_the_manifest_says_what_was_done_and_what_came_out(data: Path, out: Path) -> None:
    _split(data, "--out", out, "--sites", 3, "--unseen", "birds", "--unseen-rows", 7, "--alpha", 2, "--seed", 5)
    manifest = _manifest(out)
    assert manifest["fedhds"] == __version__
    assert manifest["arguments"] == {
        "sites": 3,
        "by": "dirichlet",
        "alpha": 2.0,
        "unseen": ["birds"],
        "unseen_rows": 7,
        "min_rows": 10,
        "seed": 5,
    }
    with Shard.open(data) as shard:
        assert manifest["inputs"] == {"pool.jsonl": shard.digest}
    assert set(manifest["files"]) == {"site-00.jsonl", "site-01.jsonl", "site-02.jsonl", "unseen.jsonl"}
    for name, described in manifest["files"].items():
        rows = _rows(out / name)
        assert described == {
            "rows": len(rows),
            "sha256": hashlib.sha256((out / name).read_bytes()).hexdigest(),
            "categories": dict(Counter(row.category for row in rows)),
        }


def test_the_same_arguments_give_the_same_bytes_and_another_seed_does_not(data: Path, tmp_path: Path) -> None:
    arguments = ("--sites", 4, "--unseen", "cats", "--unseen-rows", 20)
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        _split(data, "--out", tmp_path / folder, *arguments, "--seed", seed)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "again")
    one, other = _bytes(tmp_path / "one"), _bytes(tmp_path / "other")
    assert all(one[name] != other[name] for name in one)


def test_unseen_categories_are_held_out_from_every_site(data: Path, out: Path) -> None:
    _split(data, "--out", out, "--sites", 2, "--unseen", "birds", "--unseen", "dogs")
    files = {file.name: _rows(file) for file in out.glob("*.jsonl")}
    held_out = files.pop("unseen.jsonl")
    assert Counter(row.category for row in held_out) == {"birds": 40, "dogs": 50}
    assert {row.category for rows in files.values() for row in rows} == {"cats"}
    assert sum(map(len, files.values())) == 60


def test_unseen_rows_are_a_draw_of_the_held_out_ones(data: Path, out: Path) -> None:
    pool = [row.digest for row in _rows(data) if row.category == "birds"]
    _split(data, "--out", out, "--sites", 2, "--unseen", "birds", "--unseen-rows", 15)
    drawn = _digests(out)["unseen.jsonl"]
    assert len(drawn) == len(set(drawn)) == 15
    assert set(drawn) < set(pool)
    assert drawn != pool[:15]
    _split(data, "--out", out, "--sites", 2, "--unseen", "birds", "--unseen-rows", 9999)
    assert _digests(out)["unseen.jsonl"] == pool


def test_rows_of_every_format_keep_their_content(tmp_path: Path, out: Path) -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user", "assistant")]
    rows: list[dict[str, Any]] = [
        {"instruction": "Größe? 🐈", "context": "c\u2028", "response": "r\r\n", "references": ["r\r\n", "s"]},
        {"instruction": "i", "input": "c", "output": "o"},
        {"prompt": " p", "completion": "c ", "references": ["c ", "d"]},
        {"messages": turns},
    ]
    for row in rows:
        row["category"] = "mixed"
    data = tmp_path / "pool.jsonl.gz"
    data.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    _split(data, "--out", out, "--sites", 1, "--min-rows", 1)
    assert _rows(out / "site-00.jsonl") == _rows(data)


def _task_file(path: Path, count: int) -> None:
    instances = [{"input": f"{path.stem} {number}", "output": ["yes", "indeed"]} for number in range(count)]
    path.write_text(json.dumps({"Definition": ["Answer."], "Instances": instances}), encoding="utf-8")


def test_a_folder_of_task_files_gives_a_site_per_task(tmp_path: Path, out: Path) -> None:
    tasks = tmp_path / "tasks"
    (tasks / "ignored").mkdir(parents=True)
    for name, count in (("task002_b", 3), ("task001_a", 5), ("task003_c", 4)):
        _task_file(tasks / f"{name}.json", count)
    _split(tasks, "--out", out, "--by", "task", "--unseen", "task003_c")
    manifest = _manifest(out)
    assert {name: described["categories"] for name, described in manifest["files"].items()} == {
        "site-00.jsonl": {"task001_a": 5},
        "site-01.jsonl": {"task002_b": 3},
        "unseen.jsonl": {"task003_c": 4},
    }
    assert manifest["arguments"]["sites"] == 2
    assert set(manifest["inputs"]) == {"task001_a.json", "task002_b.json", "task003_c.json"}
    for row in _rows(out / "site-00.jsonl"):
        assert (row.instruction, row.category, row.references) == ("Answer.", "task001_a", ("yes", "indeed"))


def test_several_files_are_one_pool_and_all_of_them_are_in_the_manifest(tmp_path: Path, out: Path) -> None:
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(write_rows(tmp_path / folder / "rows.jsonl", {f"topic-{folder}": 20}))
    files.append(write_rows(tmp_path / "more.jsonl", {"topic-c": 20}))
    _split(*files, "--out", out, "--by", "task")
    assert [described["categories"] for described in _manifest(out)["files"].values()] == [
        {"topic-a": 20},
        {"topic-b": 20},
        {"topic-c": 20},
    ]
    digests = []
    for file in files:
        with Shard.open(file) as shard:
            digests.append(shard.digest)
    inputs = {str(files[0]): digests[0], str(files[1]): digests[1], "more.jsonl": digests[2]}
    assert _manifest(out)["inputs"] == inputs


def test_the_files_of_many_sites_sort_in_their_order(tmp_path: Path, out: Path) -> None:
    data = write_rows(tmp_path / "pool.jsonl", {"cats": 101})
    _split(data, "--out", out, "--sites", 101, "--min-rows", 1, "--by", "iid")
    names = sorted(file.name for file in out.glob("*.jsonl"))
    assert (len(names), names[0], names[-1]) == (101, "site-000.jsonl", "site-100.jsonl")
    assert list(_manifest(out)["files"]) == names


def test_bad_rows_are_an_error_or_left_out(data: Path, out: Path) -> None:
    with data.open("a") as file:
        file.write('{"instruction": null, "response": "x"}\n')
    with pytest.raises(DataError, match="line 151: instruction must be text"):
        _split(data, "--out", out)
    assert not out.exists()
    _split(data, "--out", out, "--skip-bad-rows")
    assert sum(described["rows"] for described in _manifest(out)["files"].values()) == 150


def test_a_split_replaces_an_earlier_one_and_nothing_else(data: Path, out: Path) -> None:
    _split(data, "--out", out, "--sites", 8, "--min-rows", 1, "--unseen", "birds")
    (out / "notes.txt").write_text("mine")
    _split(data, "--out", out, "--sites", 2)
    assert set(_bytes(out)) == {"site-00.jsonl", "site-01.jsonl", "manifest.json", "notes.txt"}
    assert set(_manifest(out)["files"]) == {"site-00.jsonl", "site-01.jsonl"}


def test_an_empty_folder_is_taken(data: Path, out: Path) -> None:
    out.mkdir(parents=True)
    _split(data, "--out", out, "--sites", 2)
    assert len(_bytes(out)) == 3


def test_a_folder_with_other_files_is_left_alone(data: Path, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "site-00.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"^--out: .* holds files that no split wrote; choose an empty folder"):
        _split(data, "--out", out)
    assert _bytes(out) == {"site-00.jsonl": b"mine"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"name": "a web app"}',
        '{"files": 3}',
        '{"files": {}}',
        '{"files": [1]}',
        '{"files": ["../pool.jsonl"]}',
    ],
)
def test_a_folder_with_another_manifest_is_left_alone(data: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text(content)
    with pytest.raises(UsageError, match=r"^--out: .*manifest\.json is not the manifest of a split"):
        _split(data, "--out", out)
    assert _bytes(out) == {"manifest.json": content.encode()}
    assert data.exists()


def test_an_out_that_cannot_be_a_folder_is_an_error(data: Path) -> None:
    with pytest.raises(UsageError, match=r"^--out: .* is a file; name a folder"):
        _split(data, "--out", data)
    with pytest.raises(UsageError, match=r"^--out: cannot write to .*Not a directory"):
        _split(data, "--out", data / "below")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--alpha", 0), "--alpha: 0 is not a finite number above 0"),
        (("--alpha", -1), "--alpha: -1 is not a finite number above 0"),
        (("--alpha", "nan"), "--alpha: nan is not a finite number above 0"),
        (("--alpha", "inf"), "--alpha: inf is not a finite number above 0"),
        (("--alpha", 1e-9, "--sites", 9), "--alpha: no draw"),
        (("--unseen", "fish"), "--unseen: there is no category 'fish'; there are birds, cats, dogs"),
        (("--unseen", "cats", "--unseen", "dogs", "--unseen", "birds"), "--unseen: it leaves no rows for the sites"),
        (("--sites", 16), "--sites: 16 sites of at least 10 rows need 160 rows, there are 150"),
        (("--sites", 12, "--unseen", "birds"), "--sites: 12 sites of at least 10 rows need 120 rows"),
        (("--sites", 2, "--min-rows", 76, "--by", "iid"), "--sites: 2 sites of at least 76 rows"),
    ],
)
def test_a_senseless_choice_is_an_error_that_names_the_flag_and_writes_nothing(
    data: Path, out: Path, arguments: tuple[object, ...], said: str
) -> None:
    with pytest.raises(UsageError, match="^" + re.escape(said)):
        _split(data, "--out", out, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--sites", 0),
        ("--min-rows", 0),
        ("--unseen-rows", 0, "--unseen", "cats"),
        ("--seed", -1),
        ("--by", "size"),
        ("--alpha", "much"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_command_line(
    data: Path, out: Path, arguments: tuple[object, ...]
) -> None:
    result = CliRunner().invoke(app, [str(argument) for argument in (data, "--out", out, *arguments)])
    assert result.exit_code == 2
    assert not out.exists()


def test_data_that_cannot_be_read_is_an_error(tmp_path: Path, data: Path, out: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("# Rows")
    with pytest.raises(UsageError, match=r"^DATA: the folder .*empty holds no file"):
        _split(tmp_path / "empty", "--out", out)
    with pytest.raises(DataError, match="no such file"):
        _split(data, tmp_path / "absent.jsonl", "--out", out)
    with pytest.raises(DataError, match="the ending is not known"):
        _split(tmp_path / "other", "--out", out)
    assert not out.exists()


def test_the_table_shows_rows_per_site_and_category(data: Path, out: Path) -> None:
    shown = _split(data, "--out", out, "--by", "category", "--sites", 3, "--unseen", "cats")
    table = [re.findall(r"[^\s│┃]+", line) for line in shown.splitlines()]
    assert ["file", "rows", "birds", "cats", "dogs"] in table
    assert ["site-00.jsonl", "30", "30"] in table
    assert ["site-01.jsonl", "30", "10", "20"] in table
    assert ["unseen.jsonl", "60", "60"] in table
    assert "4 files and manifest.json in" in shown


def test_categories_are_shown_as_they_are_called(tmp_path: Path, out: Path) -> None:
    data = write_rows(tmp_path / "pool.jsonl", {"[/qa]": 10, "[red]": 10})
    shown = _split(data, "--out", out, "--by", "task")
    assert "[/qa]" in shown
    assert "[red]" in shown
    assert [set(described["categories"]) for described in _manifest(out)["files"].values()] == [{"[/qa]"}, {"[red]"}]


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fedhds_client.commands.split as s; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
