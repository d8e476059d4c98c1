"""What becomes of updates before a robust rule: one vote for each party, then mixing for sites whose rows differ."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fedhds.spec.robust import ActiveRobustSpec
from fedhds_server.aggregation.robust.base import Doubles, squared_distances
from fedhds_server.run.parties import party_of


def mixing_matrix(
    parameters: ActiveRobustSpec, sites: Sequence[str], shares: Doubles, gram: Doubles, *, seed: int, round_number: int
) -> Doubles:
    """The matrix (m, n) that makes the m vectors that the rule takes of the n updates, sorted by site.

    First a party's updates become their mean, weighted by `shares` (n,); `gram` (n, n) has the updates' inner products.
    """
    parties = sorted({party_of(site) for site in sites})
    means = np.zeros((len(parties), len(sites)))
    for index, site in enumerate(sites):
        means[parties.index(party_of(site)), index] = shares[index]
    means /= means.sum(axis=1, keepdims=True)
    match parameters.mixing:
        case "nearest-neighbor":
            return nearest_neighbor(means @ gram @ means.T, parameters.byzantine_sites) @ means
        case "bucketing":
            # Ranked by a hash, as cohorts are: the same everywhere, and other groups in each round.
            keys = [hashlib.sha256(f"{seed}/{round_number}/bucket/{party}".encode()).digest() for party in parties]
            order = sorted(range(len(parties)), key=keys.__getitem__)
            return buckets(order, parameters.bucket_size) @ means
    return means


def nearest_neighbor(gram: Doubles, hostile: int) -> Doubles:
    """(n, n): each vector becomes the mean of the n - f nearest, itself included (Allouah et al. 2023, Alg. 2)."""
    count = len(gram)
    taken = count - hostile
    nearest = np.argsort(squared_distances(gram), axis=1, kind="stable")[:, :taken]
    matrix = np.zeros((count, count))
    np.put_along_axis(matrix, nearest, 1 / taken, axis=1)
    return matrix


def buckets(order: Sequence[int], size: int) -> Doubles:
    """(ceil(n / size), n): means of groups in this order (Karimireddy et al. 2022, Alg. 1)."""
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    matrix = np.zeros((len(groups), len(order)))
    for row, group in enumerate(groups):
        matrix[row, group] = 1 / len(group)
    return matrix
