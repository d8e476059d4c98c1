"""The strategy `global` at the site: one pass of Lloyd's k-means over its rows, for given centres."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhds_client.cells import assign
from fedhds_client.selection.base import IntraClientSelection, SelectionContext

if TYPE_CHECKING:
    from fedhds.v1 import federation_pb2 as pb


class Global(IntraClientSelection):
    """Sums and counts per centre; after the last pass the site remembers which rows are whose."""

    def release(self, context: SelectionContext) -> pb.CellReport:
        """Assigns all rows and releases what they sum up to."""
        spec, given = context.spec, context.centres
        features = context.features()
        centres = np.zeros((1, spec.feature_dimension))
        if given is not None:
            centres = np.array(given.values, dtype=np.float64).reshape(-1, given.dimension)
        cells = assign(features, centres, norm=spec.clip_norm)
        last = given is not None and given.last
        if last:
            context.chart(features, features.values, cells.labels)
        return context.releases.release_cells(context.task_id, cells, rows=context.rows, last=last)
