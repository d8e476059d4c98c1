"""How far an update may be from the global adapter: a multiple of the median norm of recent updates.

Without a bound, one site whose weights are 1e30 decides what the next adapter is, whatever its share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, median_low

import numpy as np

from fedhds.tensors.manifest import AdapterManifest
from fedhds.tensors.safetensors import AdapterReader
from fedhds_server.run.parties import party_of

# An update so many times beyond the bound is no training of this run: to shorten it would only keep its direction.
_ABSURD = 10


@dataclass(frozen=True, slots=True)
class Bounded:
    """What the bound makes of a round's updates, by site.

    `scales`: the part of its difference that counts, below 1 where it is too long. `left_out`: why an update does not
    count at all. `notes` are lines for people.
    """

    scales: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()


def update_norm(path: Path, current: Path, manifest: AdapterManifest, roles: frozenset[str]) -> float:
    """The L2 norm, in float64, of an update's difference to the global adapter `current`, over tensors with `roles`.

    Raises AdapterError for an update that does not fit the manifest.
    """
    trained = manifest.only(roles)
    square = 0.0
    with ExitStack() as stack:
        reader = stack.enter_context(AdapterReader(path, trained, differences=True))
        base = stack.enter_context(AdapterReader(current, manifest))
        for tensor in trained.tensors:
            change = reader.tensor(tensor).astype(np.float64)
            if not reader.is_difference:
                change -= base.tensor(tensor)
            square += float(np.square(change).sum())
    return math.sqrt(square)


def bounded(
    norms: Mapping[str, float], recent: Sequence[Mapping[str, float]], factor: float, *, leave_out: bool
) -> Bounded:
    """Bounds the round's updates with these norms by `factor` times the median of them and of `recent` rounds' norms.

    The sites of one party count as one. A `factor` of 0 bounds nothing; without `leave_out` every update counts in
    part. In the first round the median is that of the round alone.
    """
    own = _by_party(norms)
    if not factor or not own:
        return Bounded(dict.fromkeys(norms, 1.0))
    known = [norm for earlier in [norms, *recent] for norm in _by_party(earlier)]
    usual = median(known)
    # Of two updates alone, the longer one is not shortened to fit the other. Absurd is what is so beside the lower
    # half, but never what most updates of this round are like, whatever earlier ones were.
    limit, absurd = factor * usual, _ABSURD * factor * max(median_low(known), median_low(own))
    scales: dict[str, float] = {}
    left_out: dict[str, str] = {}
    notes: list[str] = []
    for site, norm in norms.items():
        scales[site] = min(1.0, limit / norm) if norm > 0 else 1.0
        times = f"its norm is {norm:.4g}, {norm / usual:.3g} times the median of recent updates"
        if leave_out and norm > absurd:
            left_out[site] = f"{times}; --update-norm-factor is {factor:g}"
        elif norm > limit:
            notes.append(f"the update of site {site} counts in part: {times}, --update-norm-factor {factor:g}")
    return Bounded(scales, left_out, notes)


def _by_party(norms: Mapping[str, float]) -> list[float]:
    """A norm for each party: the low median of its sites' above 0, as a norm of 0 says nothing of what is usual."""
    by_party: dict[str, list[float]] = {}
    for site, norm in norms.items():
        if norm > 0:
            by_party.setdefault(party_of(site), []).append(norm)
    return [median_low(own) for own in by_party.values()]
