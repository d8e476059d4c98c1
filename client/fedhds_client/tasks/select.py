"""The task "select": the site reports on its rows, as the run's strategy has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import TaskError
from fedhds_client.computation import Cancelled
from fedhds_client.state_files import MAX_REPORTS, MAX_RUNS, keep_newest, report_folder
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fedhds_client.data.shard import Shard
    from fedhds_client.features.extraction import Features
    from fedhds_client.models.adapter import AdapterModel

# The share of a selection that taking features is.
_FEATURES = 0.8


class SelectTask(SiteTask):
    """Groups the site's rows; the report is all that leaves the site."""

    doing = "selecting"

    def run(self, context: TaskContext) -> TaskResult:
        from fedhds_client.selection import STRATEGIES, SelectionContext
        from fedhds_client.selection.base import TargetRows
        from fedhds_client.selection.pipeline import answer
        from fedhds_client.selection.private_reporter import PrivateReporter
        from fedhds_client.selection.scores import SCORES, ScoredRows

        site, spec, settings, task = context.site, context.models.spec, context.settings, context.task
        shard = site.shard
        if shard is None:
            raise TaskError("this site has no training rows to select from")
        reporter = PrivateReporter(
            site.name,
            site.folder,
            site.account,
            context.run_id,
            spec,
            settings.rules.limits(spec, context.run_id),
            settings.rules.allow_exact_kmeans_sums,
            settings.rules.min_cluster_rows,
        )
        folder = report_folder(site.folder, context.run_id, task.id)

        def features() -> Features:
            return context.models.features.of(site, context.index, context.adapter, context.control.first(_FEATURES))

        def progress(share: float) -> None:
            context.control.report(share)
            if context.control.cancelled():
                raise Cancelled("the selection was stopped")

        def scores(name: str, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
            return SCORES[name](
                ScoredRows(shard, context.models.prompter, lambda: _loaded(context), features, progress), ids
            )

        def sketches(rows: Shard, ids: Sequence[int]) -> Features:
            from fedhds_client.selection.gradients import gradient_sketches

            return gradient_sketches(
                _loaded(context),
                context.models.prompter,
                rows,
                ids,
                seed=spec.seed,
                dimension=spec.selection.features.dimension,
                progress=progress,
            )

        def target_rows(rows: Shard) -> TargetRows:
            own = replace(reporter, account=site.target_account, own_unit="client")
            ids = range(len(rows))
            return TargetRows(
                lambda: context.models.features.of_others(rows, context.adapter), lambda: sketches(rows, ids), own
            )

        report = answer(
            SelectionContext(
                task.id,
                spec,
                len(shard),
                features,
                reporter,
                None,
                lambda features, points, labels: _draw_map(folder, features, points, labels, seed=spec.seed),
                lambda share: context.control.report(_FEATURES + (1 - _FEATURES) * share),
                lambda ids: sketches(shard, range(len(shard)) if ids is None else ids.tolist()),
                target_rows(site.target) if site.target else None,
            ),
            task.request if task.HasField("request") else None,
            strategies=STRATEGIES,
            scores=scores,
            round_number=task.round_number,
        )
        return TaskResult(report)


def _loaded(context: TaskContext) -> AdapterModel:
    """The model under the task's adapter."""
    context.models.model.load(context.adapter)
    return context.models.model


def _draw_map(
    folder: Path, features: Features, points: npt.NDArray[np.floating], labels: npt.NDArray[np.int64], *, seed: int
) -> None:
    """Keeps the map of a selection, for the report that is written once the picks are known; drops old reports."""
    from fedhds_client.report.cluster_map import cluster_map, save_map

    save_map(folder / "map.npz", cluster_map(features.ids, points, labels, features.values, seed=seed))
    run = folder.parent
    keep_newest(run, MAX_REPORTS)
    keep_newest(run.parent, MAX_RUNS)
