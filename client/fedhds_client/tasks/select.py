"""The task "select": the site reports on its rows, as the run's strategy has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import TaskError
from fedhds_client.state_files import MAX_REPORTS, MAX_RUNS, keep_newest, report_folder
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fedhds_client.features.extraction import Features

# The share of a selection that taking features is.
_FEATURES = 0.8


class SelectTask(SiteTask):
    """Groups the site's rows; the report is all that leaves the site."""

    doing = "selecting"

    def run(self, context: TaskContext) -> TaskResult:
        from fedhds_client.selection import STRATEGIES, SelectionContext
        from fedhds_client.selection.private_reporter import PrivateReporter

        site, spec, settings, task = context.site, context.models.spec, context.settings, context.task
        strategy = spec.selection.strategy
        if site.shard is None:
            raise TaskError("this site has no training rows to select from")
        if strategy.name not in STRATEGIES:
            raise TaskError(f"the selection strategy {strategy.name} asks sites for no report")
        request = None
        if task.HasField("request") and strategy.request_type is not None:
            request = context.request(strategy.request_type)
        reporter = PrivateReporter(
            site.name,
            site.folder,
            site.ledger,
            context.run_id,
            spec,
            settings.selection_max_epsilon,
            settings.allow_exact_kmeans_sums,
            settings.min_cluster_rows,
        )
        folder = report_folder(site.folder, context.run_id, task.id)
        report = STRATEGIES[strategy.name].report(
            SelectionContext(
                task.id,
                spec,
                len(site.shard),
                lambda: context.models.features.of(
                    site, context.index, context.adapter, context.control.first(_FEATURES)
                ),
                reporter,
                request,
                lambda features, points, labels: _draw_map(folder, features, points, labels, seed=spec.seed),
                lambda share: context.control.report(_FEATURES + (1 - _FEATURES) * share),
            )
        )
        return TaskResult(report)


def _draw_map(
    folder: Path, features: Features, points: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], *, seed: int
) -> None:
    """Keeps the map of a selection, for the report that is written once the picks are known; drops old reports."""
    from fedhds_client.report.cluster_map import cluster_map, save_map

    save_map(folder / "map.npz", cluster_map(features.ids, points, labels, features.values, seed=seed))
    run = folder.parent
    keep_newest(run, MAX_REPORTS)
    keep_newest(run.parent, MAX_RUNS)
