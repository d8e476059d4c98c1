"""FedIT: every site trains on all of its rows."""

from __future__ import annotations

from collections.abc import Mapping

from fedhds.v2 import selection_pb2 as pb
from fedhds_server.selection.base import InterClientSelection, Report, Selection, SelectionContext


class Full(InterClientSelection):
    """All rows."""

    def select(self, context: SelectionContext, reports: Mapping[str, Report]) -> Selection:
        return Selection({site: pb.Coreset(all=pb.AllRows()) for site, rows in sorted(context.rows.items()) if rows})
