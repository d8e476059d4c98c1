"""One step of a selection at a site: a filter's histogram, or the strategy on the rows that filters have left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedhds.errors import TaskError
from fedhds.v2.selection_pb2 import FilteredRequest, ScoreHistogram
from fedhds_client.features.extraction import Features
from fedhds_client.incoming import unpacked
from fedhds_client.selection.filters import Ids, ScoreFilter, kept_rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from google.protobuf.any_pb2 import Any
    from google.protobuf.message import Message

    from fedhds_client.selection.base import IntraClientSelection, SelectionContext


def answer(
    context: SelectionContext,
    packed: Any | None,
    *,
    strategies: Mapping[str, IntraClientSelection],
    scores: Callable[[str, Ids], npt.NDArray[np.floating]],
    round_number: int,
) -> Message:
    """What the site answers to the request `packed` (None: the selection's first step), durable.

    `context` is of the whole shard and has no request yet; `scores` gives the scores of a filter, by name, of these
    rows. Raises TaskError for a request of another type, and what `IntraClientSelection.report` raises.
    """
    strategy = context.spec.selection.strategy
    kept: Ids | None = None
    if names := context.spec.selection.filter_names:
        step = FilteredRequest(filter=names[0]) if packed is None else unpacked(packed, FilteredRequest, task="select")
        kept = kept_rows(
            step.ranges,
            rows=context.rows,
            run_id=context.reporter.run_id,
            folder=context.reporter.folder,
            round_number=round_number,
        )
        if step.filter:
            if step.filter not in names:
                raise TaskError("the task asks for scores of a filter that the run does not have")
            name, reporter = step.filter, replace(context.reporter, kind=ScoreHistogram, own_unit="example")
            half = ScoreFilter(name, round_number, kept, lambda ids: scores(name, ids))
            return half.report(replace(context, reporter=reporter))
        packed = step.request if step.HasField("request") else None
    if strategy.name not in strategies:
        raise TaskError(f"the selection strategy {strategy.name} asks sites for no report")
    request = None
    if packed is not None and strategy.request_type is not None:
        request = unpacked(packed, strategy.request_type, task="select")
    context = replace(context, request=request)
    if kept is not None:
        features, gradients, ids = context.features, context.gradients, kept
        context = replace(context, features=lambda: _of(features(), ids), gradients=lambda _: gradients(ids))
    return strategies[strategy.name].report(context)


def _of(features: Features, kept: Ids) -> Features:
    """The features of the rows that are left; `features` has all rows, by id."""
    return Features(features.ids[kept], features.values[kept])
