"""The delivered folder: four whole files and nothing else, whatever breaks and however many deliver at once."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from fedhds.errors import StorageError
from fedhds_client.updates.delivery import write_adapter_folder

TENSORS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
ENDS = "generation_config.json"


def _adapter(folder: Path, seed: int, size: int = 300_000) -> Path:
    path = folder / f"adapter-{seed}"
    path.write_bytes(np.random.default_rng(seed).bytes(size))
    path.chmod(0o600)
    return path


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return _adapter(tmp_path, 0)


def _deliver(out: Path, adapter: Path) -> None:
    config, ends = f'{{"of": "{adapter.name}"}}', f'{{"ends": "{adapter.name}"}}'
    write_adapter_folder(out, adapter, config, f"# Größe of {adapter.name} 🐈\n", ends)


def _delivered(adapter: Path) -> dict[str, bytes]:
    return {
        TENSORS: adapter.read_bytes(),
        CONFIG: f'{{"of": "{adapter.name}"}}'.encode(),
        CARD: f"# Größe of {adapter.name} 🐈\n".encode(),
        ENDS: f'{{"ends": "{adapter.name}"}}'.encode(),
    }


def test_a_delivery_is_four_files_that_others_can_read(out: Path, adapter: Path) -> None:
    _deliver(out, adapter)
    assert _files(out) == _delivered(adapter)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert adapter.exists()


def test_a_delivery_that_is_repeated_after_a_restart_changes_nothing(out: Path, adapter: Path) -> None:
    for _ in range(2):
        _deliver(out, adapter)
        assert _files(out) == _delivered(adapter)


def test_a_delivery_replaces_an_earlier_one_and_leaves_other_files_alone(
    tmp_path: Path, out: Path, adapter: Path
) -> None:
    _deliver(out, _adapter(tmp_path, 1, size=900_000))
    (out / "notes.txt").write_text("mine")
    _deliver(out, adapter)
    assert _files(out) == _delivered(adapter) | {"notes.txt": b"mine"}


@pytest.mark.parametrize("files", range(4))
@pytest.mark.parametrize("earlier", [True, False])
def test_a_delivery_that_is_stopped_midway_is_made_whole_by_the_next_start(
    tmp_path: Path, out: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, files: int, earlier: bool
) -> None:
    before = {}
    if earlier:
        _deliver(out, _adapter(tmp_path, 1))
        before = _files(out)
    real, synced = os.fsync, 0

    def stop(descriptor: int) -> None:
        nonlocal synced
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            if synced == files:
                raise KeyboardInterrupt
            synced += 1
        real(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            _deliver(out, adapter)
    after, wanted = _files(out), _delivered(adapter)
    # The tensors come last: a reader of new ones sees the files that belong to them.
    assert after.get(TENSORS) == before.get(TENSORS)
    assert all(content in (before.get(name), wanted[name]) for name, content in after.items())
    assert sum(after.get(name) == content for name, content in wanted.items()) == files
    _deliver(out, adapter)
    assert _files(out) == wanted


def test_a_full_disk_is_an_error_that_leaves_the_earlier_adapter_and_no_litter(
    tmp_path: Path, out: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _adapter(tmp_path, 1)
    _deliver(out, first)

    def full(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(1000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", full)
        with pytest.raises(StorageError, match=rf"cannot write .*out/{TENSORS}: No space left on device"):
            _deliver(out, adapter)
    assert _files(out) == _delivered(adapter) | {TENSORS: first.read_bytes()}
    _deliver(out, adapter)
    assert _files(out) == _delivered(adapter)


@pytest.mark.parametrize("name", [TENSORS, CONFIG, CARD, ENDS])
def test_a_folder_in_a_files_place_is_an_error_without_litter(out: Path, adapter: Path, name: str) -> None:
    (out / name).mkdir(parents=True)
    with pytest.raises(StorageError, match=f"cannot write {out / name}: "):
        _deliver(out, adapter)
    assert {path.name for path in out.iterdir()} <= {TENSORS, CONFIG, CARD, ENDS}
    assert not any(path.name == TENSORS and path.is_file() for path in out.iterdir())


def test_an_out_that_is_no_folder_is_an_error(tmp_path: Path, adapter: Path) -> None:
    for out in (adapter, adapter / "below"):
        with pytest.raises(StorageError, match=f"cannot write {out}/"):
            _deliver(out, adapter)
    assert list(tmp_path.iterdir()) == [adapter]


def test_sites_of_one_process_deliver_to_the_same_folder_at_the_same_time(
    tmp_path: Path, out: Path, adapter: Path
) -> None:
    _deliver(out, adapter)
    with ThreadPoolExecutor(8) as pool:
        deliveries = [pool.submit(_deliver, out, adapter) for _ in range(40)]
        while not all(delivery.done() for delivery in deliveries):
            assert (out / TENSORS).read_bytes() == adapter.read_bytes()
        for delivery in deliveries:
            delivery.result()
    assert _files(out) == _delivered(adapter)
