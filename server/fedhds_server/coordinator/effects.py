"""What the machine's instructions do: adapters are drawn and combined, selections decided, checkpoints written."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import AdapterError, DamagedArtifact, FedhdsError, StorageError
from fedhds.runtime.files import replace_file
from fedhds.secure.masks import MaskStream
from fedhds.secure.quantization import Ring32
from fedhds.status import status_dict
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, InitialKind, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import status_pb2
from fedhds_server.aggregation import AGGREGATORS, Update, aggregate
from fedhds_server.aggregation.norms import bounded, update_norm
from fedhds_server.aggregation.pipeline import Aggregated
from fedhds_server.aggregation.secure_sum import add_masked, write_mean
from fedhds_server.aggregation.weights import site_shares, weight_counts
from fedhds_server.counters import AGGREGATION_SECONDS
from fedhds_server.optimizers import OPTIMIZERS
from fedhds_server.run.events import (
    AdapterDrawn,
    AdapterUpdated,
    Discard,
    DrawAdapter,
    Instruction,
    Resolve,
    RoundAbandoned,
    RoundReport,
    RunFailed,
    StageResolved,
    WriteCheckpoint,
)
from fedhds_server.run.state import RunState, Stage, UpdateScore
from fedhds_server.selection.base import Selection
from fedhds_server.selection.record import newest_selection, write_selection
from fedhds_server.status import model_card_of, status_of
from fedhds_server.storage.checkpoint import BEST, LAST, write_checkpoint
from fedhds_server.workflows import WORKFLOWS
from fedhds_server.workflows.training import contributions, recent_norms, trainable_roles

if TYPE_CHECKING:
    from fedhds_server.coordinator.coordinator import Coordinator

logger = logging.getLogger(__name__)

_STORAGE_RETRY_S = 5.0


class Effects:
    """Performs instructions one after the other; it is the workspace of the workflows, too."""

    def __init__(self, coordinator: Coordinator, *, keep_updates: bool) -> None:
        self._coordinator = coordinator
        self._artifacts = coordinator.artifacts
        self._folder = coordinator.folder
        self._keep_updates = keep_updates
        self._queue: asyncio.Queue[Instruction] = asyncio.Queue()
        # Of a former leader, a thread may still be writing into the same folder.
        self._scratch = secrets.token_hex(4)
        self.newest_selection = newest_selection(coordinator.folder)
        """The last round of which this run folder has a selection; 0: one for all; None before the first."""

    def start(self, instructions: Iterable[Instruction]) -> None:
        """Queues instructions."""
        for instruction in instructions:
            self._queue.put_nowait(instruction)

    async def done(self) -> None:
        """Returns when nothing is queued any more."""
        await self._queue.join()

    async def run(self) -> None:
        """Works until cancelled; what a storage failure stops is tried again, any other failure ends the run."""
        while True:
            await self._performed(await self._queue.get())
            self._queue.task_done()

    async def _performed(self, instruction: Instruction) -> None:
        failure: RunFailed | None = None
        while True:
            try:
                if failure is None:
                    await self._perform(instruction)
                else:
                    await self._coordinator.post(failure)
                return
            except StorageError as error:
                logger.error("%s; trying again in %.0f s", error, _STORAGE_RETRY_S)
                await asyncio.sleep(_STORAGE_RETRY_S)
            except Exception as error:  # noqa: BLE001 - it is logged, and ends the run
                failure = run_failed(self._subject(instruction), error)

    def _subject(self, instruction: Instruction) -> str:
        """Names for people what performs an instruction."""
        state = self._coordinator.state
        if isinstance(instruction, Resolve) and state.stage is not None:
            return f"{WORKFLOWS[state.stage.kind].resolver(state)} (stage {state.stage.name})"
        return f"the instruction {type(instruction).__name__}"

    async def _perform(self, instruction: Instruction) -> None:
        state = self._coordinator.state
        match instruction:
            case DrawAdapter() if state.manifest and 0 not in state.adapters:
                decided = state.manifest
                artifact = await asyncio.to_thread(self._draw_adapter, state.adapter_manifest, state.first_values)
                # Meanwhile an operator may have evicted the site whose manifest it was.
                await self._coordinator.post(
                    lambda now: AdapterDrawn(time.time(), artifact) if now.manifest == decided else None
                )
            # Resolved already, if the machine has moved on: what was decided is not decided again.
            case Resolve(name) if (stage := state.stage) is not None and stage.closed and stage.name == name:
                workflow = WORKFLOWS[stage.kind]
                outcome = await asyncio.to_thread(workflow.resolve, state, stage, self)
                await self._coordinator.post(StageResolved(time.time(), name, outcome))
            case Discard(artifact, owner):
                uploads = self._coordinator.uploads
                if owner and not uploads.needs(artifact, owner):
                    await asyncio.to_thread(self._artifacts.delete_part, artifact, owner)
                if not (state.needs(artifact) or uploads.needs(artifact)):
                    await asyncio.to_thread(self._artifacts.delete, artifact)
            case WriteCheckpoint() if state.adapters:
                # Read here and not in the thread, as sites come and go meanwhile.
                manifest, card = state.adapter_manifest, model_card_of(state)
                await asyncio.to_thread(self._write_checkpoint, state.adapter, manifest, card)
                if (best := state.best_round) is not None:
                    adapter, card = state.adapters[best], model_card_of(state, best)
                    await asyncio.to_thread(self._write_checkpoint, adapter, manifest, card, BEST)
                report = status_of(self._coordinator.state, self._coordinator.checkpoint)
                await asyncio.to_thread(self._write_report, report)
                await self._sweep()

    async def _sweep(self) -> None:
        """After the run, deletes what a crash left behind that came between a round's result and its deletions."""
        if not self._coordinator.state.phase.over:
            return
        # The end may not be saved yet; without it, the run would go on with the updates that it has.
        await self._coordinator.post(lambda _: None)
        state = self._coordinator.state
        if state.phase.over:
            keep = {artifact.digest for artifact in state.artifacts}
            await asyncio.to_thread(self._artifacts.sweep, keep, over=True)

    # The workspace of workflows; in a thread.

    def verified(self, artifact: Artifact) -> Path:
        """A local file with the artifact's bytes; raises DamagedArtifact."""
        return self._artifacts.verified(artifact)

    def keep(self, content: bytes) -> Artifact:
        """Makes bytes a durable artifact; raises StorageError."""
        path = self._artifacts.scratch(f"message-{self._scratch}")
        replace_file(path, content)
        artifact = Artifact.of_file(path)
        self._artifacts.adopt(path, artifact)
        return artifact

    def record_selection(self, round_number: int, selection: Selection) -> None:
        """Keeps a selection for people, as selection-N.json; raises StorageError."""
        state = self._coordinator.state
        strategy = state.spec.selection.strategy.name
        write_selection(self._folder, selection, run_id=state.run_id, number=round_number, strategy=strategy)
        self.newest_selection = round_number

    @AGGREGATION_SECONDS.time()
    def aggregate(self, state: RunState, stage: Stage) -> AdapterUpdated:
        """Combines the stage's updates into the next global adapter, durably; raises StorageError.

        An update whose bytes are no longer those that were accepted, or that is absurdly long, is left out.
        """
        spec = state.spec.aggregation
        damaged: dict[str, str] = {}
        paths: dict[str, Path] = {}
        results = contributions(stage)
        for site in results:
            artifact = stage.replies[site].artifact
            try:
                if artifact is not None:
                    paths[site] = self._artifacts.verified(artifact)
            except DamagedArtifact as error:
                damaged[site] = str(error)
        current, roles = self._artifacts.verified(state.adapter), trainable_roles(state, stage.round_number)
        norms = {site: update_norm(path, current, state.adapter_manifest, roles) for site, path in paths.items()}
        recent = recent_norms(state, stage.round_number)
        bound = bounded(norms, recent, spec.update_norm_factor, leave_out=spec.robust.leaves_out)
        counted = [site for site in paths if site not in bound.left_out]
        counts = weight_counts({site: results[site] for site in counted}, spec.weight_by)
        shares = site_shares(counts, spec.max_weight_share)
        updates = [Update(site, paths[site], shares[site], bound.scales[site]) for site in counted]
        result = self._combined(state, stage, updates)
        if self._keep_updates:
            # Before the result is durable: nothing names the updates from then on.
            for site in paths:
                if artifact := stage.replies[site].artifact:
                    self._artifacts.keep_update(artifact, stage.round_number, site)
        scores = {site: UpdateScore(norm=norms[site]) for site in counted}
        for site, score in result.scores.items():
            scores[site].distance, scores[site].cosine = score.distance, score.cosine
        report = RoundReport(result.gap, scores, result.refused, tuple(bound.notes))
        return AdapterUpdated(result.adapter, result.slots, {**damaged, **bound.left_out}, report)

    def add_masked(self, updates: Sequence[Artifact]) -> Artifact:
        """The sum of masked updates, durably; raises StorageError, DamagedArtifact."""
        path = self._artifacts.scratch(f"masked-sum-{self._scratch}")
        artifact = add_masked(path, [self._artifacts.verified(update) for update in updates])
        self._artifacts.adopt(path, artifact)
        return artifact

    @AGGREGATION_SECONDS.time()
    def unmask(self, state: RunState, stage: Stage, masks: Sequence[MaskStream]) -> AdapterUpdated | RoundAbandoned:
        """The next global adapter from the stage's sum, once `masks` are applied, durably; raises StorageError."""
        secure = stage.secure
        if secure is None or secure.total is None:
            return RoundAbandoned("there is no sum")
        path = self._artifacts.scratch(f"mean-{self._scratch}")
        survivors = {site: secure.members[site] for site in secure.survivors}
        try:
            loss = write_mean(
                path,
                self._artifacts.verified(secure.total),
                masks,
                ring=Ring32(state.spec.secure.clip_norm, len(secure.members)),
                weight=sum(member.weight for member in survivors.values()),
                current=self._artifacts.verified(state.adapter),
                manifest=state.adapter_manifest,
                roles=trainable_roles(state, stage.round_number),
            )
        except AdapterError as error:
            return RoundAbandoned(str(error))
        result = self._combined(state, stage, [Update("sum", path, 1.0)])
        path.unlink(missing_ok=True)
        results = {site: pb.TrainResult(samples=member.rows, loss=loss) for site, member in sorted(survivors.items())}
        return AdapterUpdated(result.adapter, result.slots, results=results)

    def _combined(self, state: RunState, stage: Stage, updates: Sequence[Update]) -> Aggregated:
        """What updates make of the global adapter, durably."""
        spec = state.spec.aggregation
        result = aggregate(
            state.adapter_manifest,
            self._artifacts.verified(state.adapter),
            updates,
            aggregator=AGGREGATORS[spec.aggregator.name],
            optimizer=OPTIMIZERS[spec.optimizer.name],
            spec=spec,
            slots={name: self._artifacts.verified(slot) for name, slot in state.slots.items()},
            scratch=lambda name: self._artifacts.scratch(f"{name}-{self._scratch}"),
            round_number=stage.round_number,
            seed=state.spec.seed,
        )
        for path, artifact in result.files:
            self._artifacts.adopt(path, artifact)
        return result

    def _draw_adapter(self, manifest: AdapterManifest, first_values: Artifact | None) -> Artifact:
        spec = self._coordinator.state.spec
        path = self._artifacts.scratch(f"initial-{self._scratch}")
        with ExitStack() as stack:
            given = None
            if first_values is not None:
                given = stack.enter_context(AdapterReader(self.verified(first_values), manifest.from_base))

            def first_value(tensor: TensorSpec) -> FloatArray:
                from_base = tensor.initial.kind is InitialKind.BASE
                return given.tensor(tensor) if given and from_base else tensor.initial_value(spec.seed)

            artifact = write_adapter(path, manifest, first_value, spec.aggregation.adapter_dtype)
        self._artifacts.adopt(path, artifact)
        return artifact

    def _write_checkpoint(self, adapter: Artifact, manifest: AdapterManifest, card: str, name: str = LAST) -> None:
        path, scratch = self._artifacts.verified(adapter), self._artifacts.scratch(f"peft-{self._scratch}")
        path = self._coordinator.state.spec.peft.peft_file(path, manifest, scratch)
        write_checkpoint(self._folder, path, manifest.config, card, manifest.generation_config, name=name)
        scratch.unlink(missing_ok=True)

    def _write_report(self, report: status_pb2.GetStatusResponse) -> None:
        replace_file(self._folder / "report.json", json.dumps(status_dict(report), indent=2))


def run_failed(subject: str, error: Exception) -> RunFailed:
    """Logs an error that would come again at every try, and gives the event that ends the run with it.

    The reason goes to every site: of an error that fedhds did not write, it has the class alone.
    """
    logger.error("%s failed", subject, exc_info=error)
    what = str(error) if isinstance(error, FedhdsError) else type(error).__name__
    return RunFailed(time.time(), f"{subject} failed: {what}; the coordinator's log has the traceback")
