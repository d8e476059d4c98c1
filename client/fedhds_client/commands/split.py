"""`fedhds split`: one data set to the shards of a simulated federation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from fedhds_client.data.shard import Shard


def split(
    data: Annotated[list[Path], typer.Argument(help="Data file, or several; a folder means its files.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; must be empty or made by an earlier split.")],
    sites: Annotated[int, typer.Option(min=1, help="Number of sites (by task: as many as there are tasks).")] = 10,
    by: Annotated[
        Literal["dirichlet", "category", "iid", "task"], typer.Option(help="How rows are dealt out.")
    ] = "dirichlet",
    alpha: Annotated[float, typer.Option(help="Dirichlet concentration; smaller is less alike.")] = 0.5,
    unseen: Annotated[
        list[str] | None, typer.Option(help="Category that no site gets; goes to unseen.jsonl. Repeatable.")
    ] = None,
    unseen_rows: Annotated[int | None, typer.Option(min=1, help="Keep so many of the unseen rows, drawn.")] = None,
    min_rows: Annotated[int, typer.Option(min=1, help="Fewest rows of a site.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 42,
    skip_bad_rows: Annotated[bool, typer.Option(help="Leave out rows that cannot be used.")] = False,
) -> None:
    """Split DATA into shards for many sites, with held-out categories and a manifest."""
    import random
    from contextlib import ExitStack

    from fedhds.errors import UsageError
    from fedhds_client.data.partition import partition
    from fedhds_client.data.shard import Shard

    if not 0 < alpha < float("inf"):
        raise UsageError(f"--alpha: {alpha:g} is not a finite number above 0")
    with ExitStack() as stack:
        shards = [stack.enter_context(Shard.open(file, skip_bad_rows=skip_bad_rows)) for file in _files(data)]
        pool = [(shard, number) for shard in shards for number in range(len(shard))]
        # A file without categories is one task by itself: the layout of Natural Instructions.
        names = [shard[number].category or shard.path.name.split(".")[0] for shard, number in pool]
        held_out = set(unseen or ())
        unknown = sorted(held_out - set(names))
        if unknown:
            raise UsageError(
                f"--unseen: there is no category {unknown[0]!r}; there are {', '.join(sorted(set(names)))}"
            )
        seen = [index for index, name in enumerate(names) if name not in held_out]
        if not seen:
            raise UsageError("--unseen: it leaves no rows for the sites; hold out fewer categories")
        parts = partition(
            [names[index] for index in seen], sites=sites, by=by, alpha=alpha, min_rows=min_rows, seed=seed
        )
        width = len(str(len(parts) - 1))
        files = {f"site-{i:0{max(width, 2)}d}.jsonl": [seen[index] for index in part] for i, part in enumerate(parts)}
        if held_out:
            rows = [index for index, name in enumerate(names) if name in held_out]
            if unseen_rows is not None and unseen_rows < len(rows):
                rows = sorted(random.Random(seed).sample(rows, unseen_rows))
            files["unseen.jsonl"] = rows
        arguments: dict[str, object] = {
            "sites": len(parts),
            "by": by,
            "alpha": alpha,
            "unseen": sorted(held_out),
            "unseen_rows": unseen_rows,
            "min_rows": min_rows,
            "seed": seed,
        }
        _write(out, files, pool, names, arguments, _inputs(shards))
    _show(files, names, out)


def _files(data: list[Path]) -> list[Path]:
    from fedhds.errors import UsageError

    files: list[Path] = []
    for path in data:
        inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        if not inside:
            raise UsageError(f"DATA: the folder {path} holds no file")
        files += inside
    return files


def _inputs(shards: list[Shard]) -> dict[str, str]:
    """Digests by file name, or by path where two files share a name."""
    names = [shard.path.name for shard in shards]
    return {str(shard.path) if names.count(shard.path.name) > 1 else shard.path.name: shard.digest for shard in shards}


def _write(
    out: Path,
    files: dict[str, list[int]],
    pool: list[tuple[Shard, int]],
    names: list[str],
    arguments: dict[str, object],
    inputs: dict[str, str],
) -> None:
    """Writes the shards, each whole or not at all, the manifest last."""
    import hashlib
    import json
    from collections import Counter

    from fedhds import __version__
    from fedhds.errors import StorageError, UsageError
    from fedhds.runtime.files import replace_file, replacing

    manifest = out / "manifest.json"
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not manifest.exists():
        raise UsageError(f"--out: {out} holds files that no split wrote; choose an empty folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if manifest.exists():
            for name in _earlier_files(manifest):
                (out / name).unlink(missing_ok=True)
            manifest.unlink()
        descriptions = {}
        for name, rows in files.items():
            digest = hashlib.sha256()
            with replacing(out / name) as file:
                for index in rows:
                    shard, number = pool[index]
                    source = shard[number].as_source(names[index])
                    line = (json.dumps(source, ensure_ascii=False) + "\n").encode()
                    digest.update(line)
                    file.write(line)
            counts = Counter(names[index] for index in rows)
            descriptions[name] = {
                "rows": len(rows),
                "sha256": digest.hexdigest(),
                "categories": dict(sorted(counts.items())),
            }
        document = {"fedhds": __version__, "arguments": arguments, "inputs": inputs, "files": descriptions}
        replace_file(manifest, json.dumps(document, indent=2) + "\n")
    except (OSError, StorageError) as error:
        raise UsageError(f"--out: cannot write to {out} ({error})") from error


def _earlier_files(manifest: Path) -> list[str]:
    import json

    from fedhds.errors import UsageError

    try:
        names = list(json.loads(manifest.read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError):
        names = []
    # The files are about to be deleted: only such as a split writes.
    if not names or not all(
        isinstance(name, str) and re.fullmatch(r"(site-\d+|unseen)\.jsonl", name) for name in names
    ):
        raise UsageError(f"--out: {manifest} is not the manifest of a split; choose an empty folder")
    return names


def _show(files: dict[str, list[int]], names: list[str], out: Path) -> None:
    from collections import Counter

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    categories = sorted(set(names))
    table = Table()
    table.add_column("file", no_wrap=True)
    for head in ("rows", *categories):
        table.add_column(escape(head), overflow="fold", justify="right")
    for name, rows in files.items():
        counts = Counter(names[index] for index in rows)
        table.add_row(name, str(len(rows)), *(str(counts[category] or "") for category in categories))
    console = Console()
    console.print(table)
    console.print(f"{len(files)} files and manifest.json in {out}", markup=False)
