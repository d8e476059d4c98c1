"""selection-N.json in the run folder: how the clusters of all sites were grouped, for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedhds.errors import StorageError
from fedhds.runtime.files import replace_file
from fedhds_server.selection.base import Selection

# A browser draws and lists as many at once; the file has all of a larger selection.
_MAX_GROUPS = 200
_MAX_DOTS = 1500
_MAX_NAMES = 8


def write_selection(folder: Path, selection: Selection, *, run_id: str, number: int, strategy: str) -> None:
    """Writes the selection of round `number`; all of it follows from what the sites sent. Raises StorageError."""

    def as_json(clusters: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        return [
            {"site": site, "cluster": cluster}
            | ({"at": [float(f"{value:.5g}") for value in at]} if (at := selection.places.get((site, cluster))) else {})
            for site, cluster in clusters
        ]

    grouped = {member for group in selection.groups for member in group.members}
    content = {
        "run_id": run_id,
        "round_number": number,
        "strategy": strategy,
        "notes": list(selection.notes),
        "groups": [
            {
                "members": as_json(group.members),
                "winners": [{"site": site, "cluster": cluster} for site, cluster in group.winners],
                "sites": len({site for site, _ in group.members}),
            }
            for group in selection.groups
        ],
        "dropped": as_json(sorted(selection.places.keys() - grouped)),
    }
    replace_file(_path(folder, number), json.dumps(content, indent=1))


def newest_selection(folder: Path) -> int | None:
    """The last round of which a selection was written; None before the first."""
    numbers = [path.stem.removeprefix("selection-") for path in folder.glob("selection-*.json")]
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def abridged_selection(folder: Path, number: int) -> dict[str, Any]:
    """What a page shows of a selection, however large that is: the groups with most sites first, and what is left out.

    A group's `dots` are [x, y, clusters there, whether one of them gives rows]. Raises StorageError.
    """
    path = _path(folder, number)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot read {path}: {error}; restore it from a backup; the run goes on without the map"
        ) from error
    groups, room = [], _MAX_DOTS
    listed = sorted(content["groups"], key=lambda group: (-group["sites"], -len(group["members"])))
    for group in listed[:_MAX_GROUPS]:
        members = [((member["site"], member["cluster"]), member.get("at")) for member in group["members"]]
        winners = dict.fromkeys((winner["site"], winner["cluster"]) for winner in group["winners"])
        placed = [(tuple(at), cluster) for cluster, at in members if at]
        dots = Counter(at for at, _ in placed)
        won = {at for at, cluster in placed if cluster in winners}
        # Those that give rows first, should there be no room for all.
        drawn = sorted(dots, key=lambda at: at not in won)[:room]
        room -= len(drawn)
        groups.append(
            {
                "sites": group["sites"],
                "clusters": len(members),
                "members": [f"{site}/{cluster}" for (site, cluster), _ in members[:_MAX_NAMES]],
                "winners": [f"{site}/{cluster}" for site, cluster in [*winners][:_MAX_NAMES]],
                "winner_count": len(winners),
                "dots": [[*at, dots[at], at in won] for at in drawn],
            }
        )
    dropped = content.get("dropped", [])
    return {
        "round_number": content["round_number"],
        "notes": content["notes"],
        "groups": groups,
        "group_count": len(listed),
        "shared_count": sum(group["sites"] > 1 for group in listed),
        "dropped": [member["at"] for member in dropped[:room] if "at" in member],
        "dropped_count": len(dropped),
    }


def _path(folder: Path, number: int) -> Path:
    return folder / f"selection-{number}.json"
