"""The task "train": the site trains on its coreset and keeps the update on disk until the coordinator has it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from fedhds.errors import PlainUpdateAsked, TaskError
from fedhds.v2 import federation_pb2 as pb
from fedhds_client.state_files import file_key, report_folder
from fedhds_client.tasks.base import SiteTask, TaskContext, TaskResult

logger = logging.getLogger(__name__)


class TrainTask(SiteTask):
    """Trains from the global adapter; takes an update that an earlier process finished."""

    doing = "training"

    def run(self, context: TaskContext) -> TaskResult:
        if context.models.spec.secure.enabled:
            raise PlainUpdateAsked(
                "the run has secure aggregation, and the coordinator asks for an update in the clear; ask its operator"
            )
        return self.trained(context)

    def trained(self, context: TaskContext) -> TaskResult:
        """The update that the task's TrainRequest asks for, on disk."""
        from fedhds_client.selection.coreset import coreset_rows
        from fedhds_client.training.loop import train
        from fedhds_client.updates.adapter_release import AdapterRelease
        from fedhds_client.updates.update import FinishedUpdate, keep_update

        task, site, models, spec = context.task, context.site, context.models, context.models.spec
        if site.shard is None:
            raise TaskError("this site has no training rows")
        request = context.request(pb.TrainRequest)
        models.features.release(site.name)
        name = f"update-{file_key(task.id + context.adapter.name)}.safetensors"
        path = site.folder / file_key(context.run_id) / name
        roles = frozenset(request.trainable_roles)
        if finished := FinishedUpdate.load(path):
            logger.info("%s: the update of round %d is already here", site.name, task.round_number)
            return TaskResult(finished.result(min_rows=context.settings.rules.min_cluster_rows), finished)
        kind, expected = request.coreset.WhichOneof("rows"), spec.selection.strategy.coreset_kind
        if kind != expected:
            raise TaskError(
                f"the task names its rows by {kind!r}, which the run's strategy {spec.selection.strategy.name} does "
                f"not ({expected!r}): the coordinator breaks its own specification"
            )
        rows = coreset_rows(
            request.coreset,
            rows=len(site.shard),
            run_id=context.run_id,
            folder=site.folder,
            round_number=0 if spec.selection.one_shot else task.round_number,
        )
        if not rows and not spec.privacy.training.noised:
            logger.info("%s: round %d picks no row of this site", site.name, task.round_number)
            return TaskResult(pb.TrainResult())
        if request.coreset.HasField("picks"):
            _write_report(context, request.coreset.picks.select_task_id, rows)
        release = AdapterRelease.planned(
            site,
            spec,
            context.settings.rules,
            run_id=context.run_id,
            task_id=task.id,
            round_number=task.round_number,
            coreset=request.coreset,
        )
        logger.info("%s: round %d trains on %d of %d rows", site.name, task.round_number, len(rows), len(site.shard))
        models.model.load(context.adapter)
        if limit := context.settings.max_lora_rank:
            models.model.truncate(limit)
        options: dict[str, Any] = {
            "seed": spec.seed + int(file_key(task.id)[:12], 16),
            "round_number": task.round_number,
            "trainable_roles": roles,
            "progress": context.control.report,
            "cancelled": context.control.cancelled,
        }
        if spec.privacy.training.noised:
            from fedhds_client.training.dp_sgd import train_private

            outcome = train_private(
                models.model,
                site.shard,
                rows,
                models.prompter,
                spec,
                release.cost,
                expected_rows=release.asked,
                **options,
            )
        else:
            outcome = train(
                models.model,
                site.shard,
                rows,
                models.prompter,
                spec.training,
                rounds=spec.rounds.count,
                gradient_checkpointing=context.settings.gradient_checkpointing,
                **options,
            )
        if outcome.truncated_rows:
            logger.warning(
                "%s: %d of %d rows are longer than %d tokens and were truncated",
                site.name,
                outcome.truncated_rows,
                len(rows),
                models.prompter.max_length,
            )
        # Before the update is finished: a restart sends a finished one as it is.
        release.record(len(models.model.manifest().tensors))
        shown = release.shown(outcome)
        update = keep_update(
            path, models.model, context.adapter, shown, round_number=task.round_number, trainable_roles=roles
        )
        loss = "no loss is measured" if spec.privacy.training.noised else f"loss {outcome.loss:.4f}"
        text = "%s: round %d trained in %.1f s (%.0f tokens/s), %s"
        logger.info(text, site.name, task.round_number, outcome.seconds, outcome.tokens_per_s, loss)
        return TaskResult(update.result(min_rows=context.settings.rules.min_cluster_rows), update)


def _write_report(context: TaskContext, select_task_id: str, rows: Sequence[int]) -> None:
    """Writes the site's own report on a selection, once."""
    from fedhds_client.report.cluster_map import load_map
    from fedhds_client.report.page import write_local_report

    site = context.site
    folder = report_folder(site.folder, context.run_id, select_task_id)
    if not (folder / "map.npz").exists() or (folder / "report.html").exists():
        return
    page = write_local_report(
        folder,
        load_map(folder / "map.npz"),
        site=site.name,
        run_id=context.run_id,
        task_id=select_task_id,
        strategy=context.models.spec.selection.strategy.name,
        picks=rows,
        note="",
    )
    logger.info("%s: %s shows what the selection made of the shard", site.name, page)
