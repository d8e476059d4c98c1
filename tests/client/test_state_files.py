"""Names of files and folders in a site's state folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedhds.errors import StorageError
from fedhds_client.state_files import file_key, keep_newest


def test_a_file_key_is_a_short_name_that_depends_on_the_text_alone() -> None:
    texts = ["hospital-a/ward", "hospital-a", "../../etc/passwd", "", "Größe", "x" * 10_000]
    keys = [file_key(text) for text in texts]
    assert keys == [file_key(text) for text in texts]
    assert len(set(keys)) == len(texts)
    assert all(key.isalnum() and len(key) == 24 for key in keys)


def test_the_newest_entries_stay_files_and_folders(tmp_path: Path) -> None:
    for age, name in enumerate(["one", "two", "three", "four"]):
        path = tmp_path / name
        if age % 2:
            (path / "deep").mkdir(parents=True)
        else:
            path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    keep_newest(tmp_path, 9)
    assert len(list(tmp_path.iterdir())) == 4
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    with pytest.raises(StorageError, match=r"cannot delete what is no longer needed in .*gone"):
        keep_newest(tmp_path / "gone", 2)
