"""What all sites of a process share: the loaded base model, its adapter and the files fetched for it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import StorageError, TaskError
from fedhds.runspec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v1 import federation_pb2 as pb
from fedhds_client.computation import Control
from fedhds_client.coreset import coreset_rows
from fedhds_client.distributed.process_group import Prepare, ProcessGroup, Stop
from fedhds_client.link import CoordinatorLink, file_key
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site
from fedhds_client.update import Trained, keep_update

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from fedhds_client.features import Features
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.prompts import Prompter
    from fedhds_client.shard_features import ShardFeatures

logger = logging.getLogger(__name__)


class Workbench:
    """Loads the base model once per process and computes for every site, one computation at a time.

    `prepare` must have returned before any other computation. All but `fetch` run in the process's one worker thread.
    """

    def __init__(self, chosen: ClientSettings, sites: Sequence[Site], group: ProcessGroup) -> None:
        self._chosen = chosen
        self._group = group
        self._numbers = {site.name: number for number, site in enumerate(sites)}
        self._spec: RunSpec | None = None
        self._model: AdapterModel
        self._prompter: Prompter
        self._features: ShardFeatures
        self._proof: tuple[pb.ModelFingerprint, AdapterManifest]
        # Below a folder that this process holds: a fetch resumes the partial file that it finds.
        self._adapters = sites[0].folder / "adapters"
        self._fetching = asyncio.Lock()

    def prepare(self, spec: RunSpec) -> tuple[pb.ModelFingerprint, AdapterManifest]:
        """Loads the run's base model, or takes the one that another site of this process loaded."""
        from fedhds_client.models.fingerprint import fingerprint
        from fedhds_client.run_models import load_models
        from fedhds_client.shard_features import ShardFeatures

        if self._spec is None:
            self._group.broadcast(Prepare(spec.to_proto().SerializeToString()))
            base, self._model, self._prompter = load_models(self._chosen, spec)
            self._features = ShardFeatures(self._chosen, spec, self._model, self._prompter, self._group)
            proof = fingerprint(base, self._prompter.fingerprint)
            proof.feature_model = self._features.proof
            self._proof = proof, self._model.manifest()
            self._spec = spec
            logger.info("the base model is on %s, rows of up to %d tokens", base.device, self._prompter.max_length)
        elif spec != self._spec:
            raise TaskError("the coordinator gave the sites of this process different runs; start one process per run")
        return self._proof

    def close(self) -> None:
        """Stops the workers of this site's process group; nothing may be computed after it."""
        self._group.broadcast(Stop())
        self._group.close()

    async def fetch(
        self, link: CoordinatorLink, session: str, reference: pb.ArtifactRef, progress: Callable[[float], None]
    ) -> Path:
        """The global adapter on this machine's disk; earlier ones make room for it."""
        artifact = Artifact.from_proto(reference)
        path = self._adapters / artifact.digest
        async with self._fetching:
            if not path.exists():
                try:
                    self._adapters.mkdir(parents=True, exist_ok=True)
                    await link.download(session, artifact, path, progress)
                except OSError as error:
                    raise StorageError(f"cannot keep the adapter in {self._adapters}: {error.strerror}") from error
        return path

    def select(
        self, site: Site, run_id: str, task: pb.NextTaskResponse, adapter: Path, control: Control
    ) -> pb.ClusterReport | pb.CellReport:
        """Groups the site's rows; the report is what leaves the site."""
        from fedhds_client.release import Releases
        from fedhds_client.selection import SelectionContext, selection_of

        spec, shard = self._checked_spec(), site.shard
        if shard is None:
            raise TaskError("this site holds no training rows to select from")
        chosen = self._chosen
        releases = Releases(
            site.name, site.folder, site.ledger, run_id, spec, chosen.max_epsilon, chosen.share_exact_cells
        )
        context = SelectionContext(
            task.task_id,
            spec,
            len(shard),
            lambda: self._features.of(site, self._numbers[site.name], adapter, control),
            releases,
            task.select.centres if task.select.HasField("centres") else None,
            lambda features, points, labels: self._chart(site, run_id, task.task_id, features, points, labels),
        )
        return selection_of(spec.strategy).report(context)

    def _chart(
        self,
        site: Site,
        run_id: str,
        task_id: str,
        features: Features,
        points: npt.NDArray[np.floating],
        labels: npt.NDArray[np.int64],
    ) -> None:
        """Keeps the map of a selection, for the report that is written once the picks are known."""
        from fedhds_client.report.cluster_map import cluster_map, save_map

        folder = _report_folder(site, run_id, task_id)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        seed = self._checked_spec().seed
        save_map(folder / "map.npz", cluster_map(features.ids, points, labels, features.values, seed=seed))

    def _report(self, site: Site, run_id: str, task_id: str, rows: Sequence[int]) -> None:
        """Writes the site's own report on a selection, once."""
        from fedhds_client.report.cluster_map import load_map
        from fedhds_client.report.page import write_local_report

        folder = _report_folder(site, run_id, task_id)
        if not (folder / "map.npz").exists() or (folder / "report.html").exists():
            return
        strategy = self._checked_spec().strategy
        chart = load_map(folder / "map.npz")
        page = write_local_report(
            folder, chart, site=site.name, run_id=run_id, task_id=task_id, strategy=strategy, picks=rows, note=""
        )
        logger.info("%s: what the selection made of the shard stands in %s", site.name, page)

    def train(
        self, site: Site, run_id: str, task: pb.NextTaskResponse, adapter: Path, control: Control
    ) -> Trained | None:
        """Trains on the task's coreset, None when it is empty; takes an update that an earlier process finished."""
        from fedhds_client.training import train

        spec, shard = self._checked_spec(), site.shard
        if shard is None:
            raise TaskError("this site holds no training rows")
        self._features.let_go(site.name)
        path = site.folder / file_key(run_id) / f"update-{file_key(task.task_id + adapter.name)}.safetensors"
        if finished := Trained.found(path):
            logger.info("%s: the update of round %d is already here", site.name, task.round)
            return finished
        rows = coreset_rows(task.train.coreset, rows=len(shard), run_id=run_id, folder=site.folder)
        if not rows:
            logger.info("%s: round %d picks no row of this site", site.name, task.round)
            return None
        if task.train.coreset.HasField("picks"):
            self._report(site, run_id, task.train.coreset.picks.select_task_id, rows)
        logger.info("%s: round %d trains on %d of %d rows", site.name, task.round, len(rows), len(shard))
        self._model.load(adapter)
        outcome = train(
            self._model,
            shard,
            rows,
            self._prompter,
            spec,
            seed=spec.seed + int(file_key(f"{task.task_id}")[:12], 16),
            progress=control.report,
            cancelled=control.cancelled,
        )
        if outcome.truncated_rows:
            logger.warning(
                "%s: %d of %d rows are longer than %d tokens and were truncated",
                site.name,
                outcome.truncated_rows,
                len(rows),
                self._prompter.max_length,
            )
        trained = keep_update(path, self._model, adapter, outcome, number=task.round)
        logger.info("%s: round %d trained in %.1f s, loss %.4f", site.name, task.round, outcome.seconds, outcome.loss)
        return trained

    def evaluate(self, site: Site, number: int, adapter: Path, control: Control) -> pb.EvaluationResult:
        """Measures an adapter on the site's held-out rows."""
        from fedhds_client.evaluation import evaluate

        spec, held_out = self._checked_spec(), site.held_out
        if held_out is None:
            raise TaskError("this site holds no rows to evaluate on")
        self._model.load(adapter)
        sums = evaluate(
            self._model,
            held_out,
            self._prompter,
            max_new_tokens=spec.max_new_tokens,
            batch_size=self._chosen.inference_batch_size,
            progress=control.report,
            cancelled=control.cancelled,
        )
        logger.info(
            "%s: %s loss %.4f and Rouge-L %.4f on %d held-out rows",
            site.name,
            f"after round {number}" if number else "before the first round",
            sums.loss,
            sums.rouge_l,
            sums.rows,
        )
        return pb.EvaluationResult(
            rows=sums.rows, tokens=sums.tokens, loss_sum=sums.loss_sum, rouge_l_sum=sums.rouge_l_sum
        )

    def _checked_spec(self) -> RunSpec:
        if self._spec is None:
            raise TaskError("the base model is not loaded yet")
        return self._spec


def _report_folder(site: Site, run_id: str, task_id: str) -> Path:
    return site.folder / "reports" / file_key(run_id) / file_key(task_id)
