"""What all sites of a process share: the loaded models, the fetched adapters, and the tasks that run on them."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import (
    AdapterError,
    PlainUpdateAsked,
    SecureAggregationError,
    StorageError,
    TaskError,
    TooFewSites,
)
from fedhds.runtime.files import make_folder
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.safetensors import AdapterReader, file_sizes
from fedhds_client.distributed.process_group import Prepare, ProcessGroup, Stop
from fedhds_client.site import Site, check_held_out
from fedhds_client.state_files import file_key
from fedhds_client.stated_rows import stated_rows
from fedhds_client.tasks import TaskContext, TaskResult, task_kind
from fedhds_client.updates.delivery import write_adapter_folder
from fedhds_client.updates.personal import PersonalJob, PersonalSettings, personalize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fedhds.spec import RunSpec
    from fedhds.tensors.manifest import AdapterManifest
    from fedhds.v2 import federation_pb2 as pb
    from fedhds.v2 import transfer_pb2
    from fedhds_client.computation import Control
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.features.shard_features import ShardFeatures
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.rpc_client import CoordinatorClient
    from fedhds_client.settings import ClientSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunModels:
    """What a run loads once per process."""

    spec: RunSpec
    model: AdapterModel
    prompter: Prompter
    features: ShardFeatures


class TaskExecutor:
    """Loads the base model once per process and computes for every site, one computation at a time.

    `prepare` must have returned before any other computation. All but `fetch` run in the process's one worker thread.
    """

    def __init__(self, settings: ClientSettings, sites: Sequence[Site], group: ProcessGroup) -> None:
        self._settings = settings
        self._group = group
        self._indices = {site.name: index for index, site in enumerate(sites)}
        self._models: RunModels | None = None
        self._proof: tuple[pb.ModelFingerprint, AdapterManifest]
        self._sizes = range(0)
        # Below a folder that this process has locked: a fetch resumes the partial file that it finds.
        self._adapters = sites[0].folder / "adapters"
        self._fetching = asyncio.Lock()
        # By session: the adapter that its site fetched last, which its task may still need.
        self._needed: dict[str, Path] = {}
        self._checked: set[Path] = set()

    def prepare(self, spec: RunSpec) -> tuple[pb.ModelFingerprint, AdapterManifest]:
        """Loads the run's base model, or takes the one that another site of this process loaded."""
        from fedhds_client.features.shard_features import ShardFeatures
        from fedhds_client.models.fingerprint import fingerprint
        from fedhds_client.run_models import load_models

        if self._models is None:
            self._settings.rules.check_run(spec)
            _check_secure(self._settings, spec)
            self._group.broadcast(Prepare(spec.model_dump_json().encode()))
            base, model, prompter = load_models(self._settings, spec)
            features = ShardFeatures(self._settings, spec, model, prompter, self._group)
            proof = fingerprint(base, prompter.fingerprint)
            proof.feature_model = features.proof
            self._proof = proof, replace(model.manifest(), stop_tokens=prompter.stop_tokens)
            self._sizes = file_sizes(model.manifest(), spec.aggregation.adapter_dtype)
            self._models = RunModels(spec, model, prompter, features)
            logger.info("the base model is on %s, rows of up to %d tokens", base.device, prompter.max_length)
        elif spec != self._models.spec:
            raise TaskError("the coordinator gave the sites of this process different runs; start one process per run")
        return self._proof

    def judge(self, site: Site, run_id: str, control: Control) -> int:
        """Judges all rows of `site` with the run's template, and answers how many to train on it registers with.

        Raises DataError for a row that the template refuses, unless the settings leave such rows out; SettingsError
        when too few held-out rows remain; PrivacyError when not even a noised number may leave.
        """
        from fedhds_client.data.judging import judge

        if self._models is None:
            raise TaskError("the base model is not loaded yet")
        for shard in filter(None, (site.shard, site.held_out, site.validation, site.target)):
            judge(
                shard,
                self._models.prompter,
                skip_bad_rows=self._settings.skip_bad_rows,
                operator="the operator of the coordinator",
                control=control,
            )
        check_held_out(site, self._settings)
        return stated_rows(site, self._models.spec, self._settings.rules, run_id)

    def close(self) -> None:
        """Stops the workers of this site's process group; nothing may be computed after it."""
        self._group.broadcast(Stop())
        self._group.close()

    async def fetch(
        self,
        client: CoordinatorClient,
        session: str,
        reference: transfer_pb2.ArtifactRef,
        progress: Callable[[float], None],
    ) -> Path:
        """The global adapter on this machine's disk, checked against the site's own manifest; earlier ones go.

        Raises AdapterError for one that does not fit it, before it is fetched if its size does not.
        """
        artifact = Artifact.from_proto(reference)
        (_, manifest), sizes = self._proof, self._sizes
        if artifact.size not in sizes:
            raise AdapterError(
                f"the coordinator's adapter has {artifact.size} bytes; this run's have {sizes.start} or a little more"
            )
        path = self._adapters / artifact.digest
        async with self._fetching:
            try:
                make_folder(self._adapters, private=True)
                if not path.exists():
                    await client.download(session, artifact, path, progress)
                if path not in self._checked:
                    await asyncio.to_thread(_check_adapter, path, manifest)
                    self._checked.add(path)
                self._needed[session] = path
                for other in self._adapters.iterdir():
                    if other not in self._needed.values():
                        other.unlink()
            except AdapterError:
                path.unlink(missing_ok=True)
                raise
            except OSError as error:
                raise StorageError(f"cannot keep the adapter in {self._adapters}: {error.strerror}") from error
        return path

    def write_first_values(self, path: Path) -> Artifact:
        """Writes the tensors of the first adapter that follow from the base model; raises AdapterError without any."""
        artifact = self._models.model.write_first_values(path) if self._models else None
        if artifact is None:
            raise AdapterError(
                "the coordinator asks for first values of the adapter, which follow from the run's seed alone; tell "
                "its operator"
            )
        return artifact

    def peft_file(self, adapter: Path, folder: Path) -> Path:
        """The file as PEFT saves it of a global adapter: `adapter` itself, or one in `folder`; raises StorageError."""
        if self._models is None:
            raise TaskError("the base model is not loaded yet")
        return self._models.spec.peft.peft_file(adapter, self._proof[1], folder / "peft.safetensors")

    def deliver(self, site: Site, run_id: str, adapter: Path, card: str) -> None:
        """Writes the final adapter to --out, configured as this site's own PEFT and tokenizer have it.

        From then on a personal adapter is to be made, if the settings want one. Raises StorageError.
        """
        manifest, out = self._proof[1], self._settings.out
        file = self.peft_file(adapter, site.folder / file_key(run_id))
        write_adapter_folder(out, file, manifest.config, card, manifest.generation_config)
        if self._settings.personalize and self._models is not None and site.shard:
            PersonalJob(run_id, self._models.spec.model_dump_json(), adapter.name).keep(site.folder)

    def personalize(self, site: Site, job: PersonalJob, control: Control) -> None:
        """Makes the personal adapter of `site`; raises what fedhds raises when it cannot be made."""
        from fedhds.spec import RunSpec
        from fedhds_client.data.judging import judge

        self.prepare(RunSpec.model_validate_json(job.spec))
        assert self._models is not None
        settings = self._settings
        for shard in filter(None, (site.shard, site.validation)):
            judge(shard, self._models.prompter, skip_bad_rows=settings.skip_bad_rows, operator="you", control=control)
        target = settings.out / "personal"
        if len(settings.data) > 1:
            target /= settings.data[self._indices[site.name]].name.split(".")[0]
        own = PersonalSettings(settings.personal_epochs, settings.personal_shared_a, settings.inference_batch_size)
        adapter = self._adapters / job.digest
        scores = personalize(
            self._models, site, job, own, adapter=adapter, out=settings.out, target=target, control=control
        )
        for name, means in scores.items():
            text = ", ".join(f"{metric} {value:.4f}" for metric, value in means.items())
            logger.info("%s: %-8s %s", site.name, name, text)
        logger.info("%s: the personal adapter is in %s", site.name, target)

    def execute(self, site: Site, run_id: str, task: pb.Task, adapter: Path, control: Control) -> TaskResult:
        """Does a task of `site`; raises TaskError for a kind that this version does not know."""
        if self._models is None:
            raise TaskError("the base model is not loaded yet")
        index = self._indices[site.name]
        context = TaskContext(task, run_id, site, index, self._settings, self._models, adapter, control)
        return task_kind(task.kind).run(context)


def _check_secure(settings: ClientSettings, spec: RunSpec) -> None:
    """Raises PlainUpdateAsked, TooFewSites or SecureAggregationError for a run whose sums this site does not join."""
    least = settings.rules.require_secure_sites
    if least and not spec.secure.enabled:
        raise PlainUpdateAsked(
            f"the run sends updates in the clear, and this site has --require-secure-sites {least}; ask the operator "
            "of the coordinator for --secure-aggregation"
        )
    if spec.secure.enabled and spec.secure.min_sites < least:
        raise TooFewSites(
            f"the run sums the updates of {spec.secure.min_sites} certificates' sites at least, and this site has "
            f"--require-secure-sites {least}; ask the operator of the coordinator for a larger --min-secure-sites"
        )
    if spec.secure.enabled and settings.tls_cert is None:
        raise SecureAggregationError(
            "the run has secure aggregation, for which a site needs --tls-ca, --tls-cert and --tls-key"
        )


def _check_adapter(path: Path, manifest: AdapterManifest) -> None:
    """Raises AdapterError for a file that does not hold the manifest's tensors with finite values."""
    with AdapterReader(path, manifest) as reader:
        for spec in manifest.tensors:
            reader.tensor(spec)
