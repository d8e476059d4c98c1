"""Splitting one pool of rows into the shards of many sites, reproducibly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from fedhds.errors import UsageError

By = Literal["dirichlet", "category", "iid", "task"]

# A draw that leaves a site short is drawn again; with sensible settings a few draws do.
_MAX_DRAWS = 1000


def partition(
    categories: Sequence[str], *, sites: int, by: By, alpha: float, min_rows: int, seed: int
) -> list[list[int]]:
    """Row numbers per site, each row at exactly one; `categories` holds one name per row.

    dirichlet: every category is dealt out by shares drawn from Dirichlet(alpha) over the sites (Yurochkin et al.
    2019), redrawn until every site has `min_rows`. category: rows in order of category, cut into equal runs.
    iid: shuffled, cut into equal runs. task: one category per site. Raises UsageError.
    """
    rng = np.random.default_rng(seed)
    numbers = rng.permutation(len(categories))
    if by == "task":
        names = sorted(set(categories))
        return [[int(i) for i in numbers if categories[i] == name] for name in names]
    if sites * max(min_rows, 1) > len(categories):
        raise UsageError(
            f"--sites: {sites} sites of at least {min_rows} rows need {sites * min_rows} rows, there are "
            f"{len(categories)}; ask for fewer sites or a smaller --min-rows"
        )
    if by == "dirichlet":
        return _dirichlet(categories, numbers, sites, alpha, min_rows, rng)
    if by == "category":
        numbers = np.array(sorted(numbers, key=lambda i: categories[i]), dtype=np.int64)
    return [sorted(map(int, part)) for part in np.array_split(numbers, sites)]


def _dirichlet(
    categories: Sequence[str],
    numbers: np.ndarray,
    sites: int,
    alpha: float,
    min_rows: int,
    rng: np.random.Generator,
) -> list[list[int]]:
    members = {name: [int(i) for i in numbers if categories[i] == name] for name in sorted(set(categories))}
    for _ in range(_MAX_DRAWS):
        shards: list[list[int]] = [[] for _ in range(sites)]
        for rows in members.values():
            cuts = np.floor(np.cumsum(rng.dirichlet([alpha] * sites))[:-1] * len(rows) + 0.5).astype(int)
            for shard, part in zip(shards, np.split(np.array(rows, dtype=np.int64), cuts), strict=True):
                shard.extend(map(int, part))
        if min(map(len, shards)) >= min_rows:
            return [sorted(shard) for shard in shards]
    raise UsageError(
        f"--alpha: no draw of Dirichlet({alpha:g}) gave every one of {sites} sites {min_rows} rows; ask for a "
        "larger --alpha, fewer --sites or a smaller --min-rows"
    )
