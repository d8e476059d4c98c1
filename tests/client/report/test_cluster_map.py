"""The map of a selection: its parts fit together, and a saved map comes back whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedhds.errors import StorageError
from fedhds_client.report.cluster_map import ClusterMap, cluster_map, load_map, save_map
from tests.support.planted import planted


def test_points_of_two_dimensions_are_the_map() -> None:
    points = np.random.default_rng(0).normal(size=(30, 2))
    result = cluster_map(np.arange(30), points, np.zeros(30), points, seed=0)
    assert (result.points == points).all()
    assert result.dimensions == 2


def test_points_of_more_dimensions_are_shown_by_their_first_two_principal_components() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(50, 2)) * [20, 5]
    turned = np.linalg.qr(rng.normal(size=(9, 9)))[0][:2]
    result = cluster_map(np.arange(50), plane @ turned, np.arange(50) % 2, plane, seed=0)
    between = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    assert np.allclose(np.linalg.norm(result.points[:, None] - result.points[None], axis=2), between)
    assert result.dimensions == 9


def test_points_of_one_dimension_lie_on_a_line() -> None:
    result = cluster_map(np.arange(6), np.arange(6.0)[:, None], np.arange(6) % 2, np.ones((6, 3)), seed=0)
    assert np.ptp(result.points[:, 0]) == pytest.approx(5)
    assert not result.points[:, 1].any()


def test_parts_of_different_length_are_no_map() -> None:
    with pytest.raises(ValueError, match="labels"):
        cluster_map(np.arange(4), np.zeros((4, 2)), np.zeros(3), np.zeros((3, 5)), seed=0)


def test_a_saved_map_comes_back_as_it_was(tmp_path: Path) -> None:
    shard = planted(50, 3, dimensions=5, noise=4)
    shard = ClusterMap(shard.ids, shard.points, shard.labels, {**shard.scores, "silhouette_points": None}, 5)
    path = tmp_path / "maps" / "map.npz"
    save_map(path, planted(5, 1, noise=0))
    save_map(path, shard)
    result = load_map(path)
    for name in ("ids", "points", "labels"):
        loaded, saved = getattr(result, name), getattr(shard, name)
        assert loaded.dtype == saved.dtype
        assert (loaded == saved).all()
    assert result.scores == shard.scores
    assert result.dimensions == 5
    assert os.listdir(path.parent) == ["map.npz"]
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_no_damage_of_a_saved_map_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    shard = planted(6, 2, noise=1)
    save_map(path, shard)
    whole = path.read_bytes()
    messages = []
    # A stride that shares no factor with the fields' sizes: every kind of field is hit.
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            result = load_map(path)
        except StorageError as error:
            messages.append(str(error))
        else:
            # The archive's own notes, such as dates, may change without harm.
            assert result.ids.tolist() == shard.ids.tolist()
            assert result.points.tolist() == shard.points.tolist()
            assert result.labels.tolist() == shard.labels.tolist()
            assert result.scores == shard.scores
    assert len(messages) > len(whole) / 7 / 2
    assert not [message for message in messages if "map.npz is damaged" not in message]


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", None])
def test_what_is_not_a_map_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "map.npz"
    save_map(path, planted())
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    with pytest.raises(StorageError, match=r"map\.npz is damaged"):
        load_map(path)


def test_a_damaged_shape_asks_for_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    save_map(path, planted(5000, 2, noise=1))
    whole = path.read_bytes()
    assert whole.count(b"(5000, 2), }       ") == 1
    path.write_bytes(whole.replace(b"(5000, 2), }       ", b"(9999999999999,2),}"))
    with pytest.raises(StorageError, match="damaged"):
        load_map(path)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    np.savez(path, ids=np.array([{}], dtype=object), points=np.zeros((1, 2)), labels=np.zeros(1), facts="{}")
    with pytest.raises(StorageError, match="damaged"):
        load_map(path)


def test_a_map_that_is_not_there_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"absent\.npz"):
        load_map(tmp_path / "absent.npz")


def test_a_map_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        save_map(tmp_path / "taken" / "map.npz", planted())
