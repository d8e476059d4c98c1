"""The run folder of a coordinator: its lock, and the name of who holds it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedhds.errors import SettingsError
from fedhds_server import app
from fedhds_server.app import _run_folder


def holder_of(folder: Path) -> str:
    with _run_folder(folder) as (_, holder):
        return holder


def test_the_same_folder_has_the_same_holder_and_a_copy_another(tmp_path: Path) -> None:
    holder = holder_of(tmp_path / "run")
    assert holder_of(tmp_path / "run") == holder
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert holder_of(tmp_path / "copy") != holder
    # Of two that run, neither is the other.
    with _run_folder(tmp_path / "run") as (_, one), _run_folder(tmp_path / "copy") as (_, other):
        assert one != other


def test_another_boot_or_a_system_without_boot_ids_is_another_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders = {holder_of(tmp_path / "run")}
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr(app, "_BOOT_ID", tmp_path / "boot_id")
    holders.add(holder_of(tmp_path / "run"))
    monkeypatch.setattr(app, "_BOOT_ID", tmp_path / "none")
    holders |= {holder_of(tmp_path / "run") for _ in range(2)}
    assert len(holders) == 4


def test_a_folder_that_is_locked_is_refused(tmp_path: Path) -> None:
    with (
        _run_folder(tmp_path / "run"),
        pytest.raises(SettingsError, match="in use by another coordinator"),
        _run_folder(tmp_path / "run"),
    ):
        raise AssertionError
