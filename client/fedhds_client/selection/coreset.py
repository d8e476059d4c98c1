"""Which of a site's rows train: resolves the coreset of a task, and keeps the clusters that its picks refer to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedhds.errors import StorageError, TaskError
from fedhds.runtime.files import replace_file
from fedhds.v2 import selection_pb2 as pb
from fedhds_client.selection.filters import kept_rows
from fedhds_client.state_files import MAX_RUNS, file_key, keep_newest


def coreset_rows(
    coreset: pb.Coreset, *, rows: int, run_id: str, folder: Path, round_number: int = 0
) -> tuple[int, ...]:
    """Ids of the rows to train on, ascending, each once, all within a shard of `rows` rows.

    `folder` is the site's state folder, `round_number` that of the selection, 0 where there is one for all rounds. The
    result is empty when all picks are of padding, which fills up clusters
    that the site does not have: then there is nothing to train. Raises TaskError for picks from clusters that this
    site never reported, StorageError when they cannot be read.
    """
    match coreset.WhichOneof("rows"):
        case "all":
            return tuple(kept_rows(coreset.ranges, rows=rows, run_id=run_id, folder=folder, round_number=round_number))
        case "random":
            kept = kept_rows(coreset.ranges, rows=rows, run_id=run_id, folder=folder, round_number=round_number)
            count = min(coreset.random.count, len(kept))
            sample = np.random.default_rng(coreset.random.seed).choice(len(kept), count, replace=False) if count else ()
            return tuple(sorted(int(kept[place]) for place in sample))
        case "picks":
            task_id = coreset.picks.select_task_id
            return _picked(coreset.picks, *_load_clusters(_file(folder, run_id, task_id), task_id, rows))
        case other:
            raise TaskError(f"the task names its rows in a way that this version does not know ({other})")


def in_drawn_order(members: Sequence[Sequence[int]], *, rows: int, seed: int, task_id: str) -> list[list[int]]:
    """The rows of each cluster in an order that chance decides, the same whenever the task is repeated.

    Each of the shard's `rows` has a place of its own in it, so that no row moves others when it is left out.
    """
    digest = hashlib.sha256(f"{seed}/{task_id}".encode()).digest()
    places = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(rows)
    return [sorted(cluster, key=lambda row: int(places[row])) for cluster in members]


def save_clusters(
    folder: Path,
    run_id: str,
    task_id: str,
    members: Sequence[Sequence[int]],
    *,
    unclustered: Sequence[int] = (),
    rows: int,
) -> None:
    """Durably keeps the clusters of a report, numbered as in it: row ids, nearest to the centroid first; no text.

    Call it before the report leaves, so that picks resolve however the process ends. Those of this run stay, as a
    coordinator that was restored from a backup may ask again; of earlier runs the newest ones. Raises StorageError.
    """
    content = {"rows": rows, "members": [list(cluster) for cluster in members], "unclustered": list(unclustered)}
    replace_file(_file(folder, run_id, task_id), json.dumps(content), private=True)
    keep_newest(folder / "clusters", MAX_RUNS)


def _picked(picks: pb.ClusterPicks, members: list[list[int]], unclustered: list[int]) -> tuple[int, ...]:
    picked = set(unclustered[: picks.unclustered])
    for pick in picks.clusters:
        if pick.cluster_id >= len(members):
            raise TaskError(
                f"{picks.select_task_id} reported {len(members)} clusters; none has number {pick.cluster_id}"
            )
        picked.update(members[pick.cluster_id][: pick.count])
    return tuple(sorted(picked))


def _load_clusters(file: Path, task_id: str, rows: int) -> tuple[list[list[int]], list[int]]:
    try:
        content = json.loads(file.read_text(encoding="ascii"))
        members: list[list[int]] = content["members"]
        unclustered: list[int] = content["unclustered"]
        rows_then: int = content["rows"]
    except FileNotFoundError as error:
        raise TaskError(f"this site has reported no clusters in the task {task_id}") from error
    except OSError as error:
        raise StorageError(f"cannot read the clusters in {file}: {error.strerror}; check the state folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the clusters in {file} are damaged; restore the file from a backup") from error
    if rows_then != rows:
        raise TaskError(f"the shard has {rows} rows, but had {rows_then} when its clusters were reported")
    return members, unclustered


def _file(folder: Path, run_id: str, task_id: str) -> Path:
    return folder / "clusters" / file_key(run_id) / f"{file_key(task_id)}.json"
