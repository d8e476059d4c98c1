"""A finished update on the site's disk, and what quantization rounded away of it until the next one makes up for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedhds.errors import StorageError
from fedhds.runtime.files import make_folder, replace_file
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.manifest import AdapterManifest, FloatArray, TensorSpec
from fedhds.tensors.safetensors import AdapterReader, write_adapter
from fedhds.v2 import federation_pb2 as pb

if TYPE_CHECKING:
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.training.loop import TrainOutcome

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UpdateMetadata:
    """What is known of an update besides its tensors; `residual` is the digest of what was rounded away, if any was."""

    digest: str
    size: int
    samples: int
    loss: float
    seconds: float
    truncated: int
    round_number: int
    residual: str = ""
    loss_rows: int | None = None
    """Rows behind `loss`; None: all samples, as earlier versions wrote it."""
    response_tokens: int | None = None
    tokens_per_s: float = 0.0

    @classmethod
    def read(cls, note: Path) -> UpdateMetadata | None:
        """The metadata of the update that an earlier process finished; None when the note is damaged."""
        try:
            return cls(**json.loads(note.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            logger.warning("the note on the finished update %s is damaged: %s", note, error)
            return None


@dataclass(frozen=True)
class FinishedUpdate:
    """A finished update on disk, kept until the coordinator has it: a restart uploads it instead of training again."""

    path: Path
    metadata: UpdateMetadata

    @property
    def artifact(self) -> Artifact:
        """The update's bytes."""
        return Artifact(self.metadata.digest, self.metadata.size)

    def result(self, *, min_rows: int = 1) -> pb.TrainResult:
        """The wire message; it leaves out a loss over fewer than `min_rows` rows, and numbers of their tokens."""
        rows = self.metadata.samples if self.metadata.loss_rows is None else self.metadata.loss_rows
        said = rows >= min_rows
        return pb.TrainResult(
            update=self.artifact.to_proto(),
            samples=self.metadata.samples,
            loss=self.metadata.loss if said else None,
            train_s=self.metadata.seconds,
            truncated_rows=self.metadata.truncated,
            response_tokens=self.metadata.response_tokens if said else None,
            tokens_per_s=self.metadata.tokens_per_s if said else None,
        )

    @classmethod
    def load(cls, path: Path) -> FinishedUpdate | None:
        """The update that an earlier process finished at `path`; None when there is none, or it is damaged."""
        note = path.with_suffix(".json")
        if not path.exists() or not note.exists():
            return None
        metadata = UpdateMetadata.read(note)
        update = cls(path, metadata) if metadata else None
        return update if update and Artifact.of_file(path) == update.artifact else None


def keep_update(
    path: Path,
    model: AdapterModel,
    adapter: Path,
    outcome: TrainOutcome,
    *,
    round_number: int,
    trainable_roles: frozenset[str] = frozenset(),
) -> FinishedUpdate:
    """Writes what training made of the global adapter `adapter` in a round to `path`, in the run's wire type.

    It has the tensors whose roles are in `trainable_roles` (empty: all). A difference (int8) is to `adapter`, plus what
    was rounded away of the site's update before; what is rounded away of this one is beside it, and what was of tensors
    that do not train waits for a later update. The update is finished, and earlier ones go, once its note is durable.
    Raises StorageError.
    """
    folder = path.parent
    sent = model.manifest().only(trainable_roles or model.manifest().roles)
    try:
        make_folder(folder)
        for old in folder.glob("update-*.safetensors"):
            old.unlink()
        residual = ""
        if model.codec.is_difference:
            artifact, residual = _write_difference(path, model, sent, adapter, _residual(path, round_number))
        else:
            artifact = model.codec.write(path, sent, model.values())
        metadata = UpdateMetadata(
            digest=artifact.digest,
            size=artifact.size,
            samples=outcome.samples,
            loss=outcome.loss,
            seconds=outcome.seconds,
            truncated=outcome.truncated_rows,
            round_number=round_number,
            residual=residual,
            loss_rows=outcome.loss_rows,
            response_tokens=outcome.response_tokens,
            tokens_per_s=outcome.tokens_per_s,
        )
        replace_file(path.with_suffix(".json"), json.dumps(asdict(metadata)), private=True)
        for old in folder.glob("update-*"):
            if old.stem != path.stem:
                old.unlink()
    except OSError as error:
        raise StorageError(f"cannot keep the update in {folder}: {error.strerror}; make room there") from error
    return FinishedUpdate(path, metadata)


def _residual(path: Path, round_number: int) -> Path | None:
    """What was rounded away of the site's update before the one at `path`; None, and a word to the log, without one."""
    notes = [note for note in path.parent.glob("update-*.json") if note.stem != path.stem]
    usable = {note: metadata for note in notes if (metadata := UpdateMetadata.read(note)) and metadata.residual}
    last = max(usable, key=lambda note: usable[note].round_number, default=None)
    if last is None:
        if notes:
            logger.warning("what was rounded away of the update before is lost; this one starts without it")
        elif round_number > 1:
            logger.info("there is no earlier update of this run in %s to make up the rounding of", path.parent)
        return None
    residual = last.with_suffix(".residual")
    if not residual.exists() or Artifact.of_file(residual).digest != usable[last].residual:
        lost = usable[last].round_number
        logger.warning(
            "what was rounded away of round %d's update is lost or damaged; this one starts without it", lost
        )
        return None
    return residual


def _write_difference(
    path: Path, model: AdapterModel, sent: AdapterManifest, adapter: Path, residual: Path | None
) -> tuple[Artifact, str]:
    """Writes the update of the tensors of `sent` and what was rounded away of all; the update, the other's digest."""
    roles = sent.roles
    with _difference(model, adapter, residual) as difference:
        artifact = model.codec.write(path, sent, difference)
        with AdapterReader(path, sent, differences=True) as update:

            def rest(spec: TensorSpec) -> FloatArray:
                return difference(spec) - update.tensor(spec) if spec.role in roles else difference(spec)

            kept = write_adapter(path.with_suffix(".residual"), model.manifest(), rest, "float32")
    return artifact, kept.digest


@contextmanager
def _difference(
    model: AdapterModel, adapter: Path, residual: Path | None
) -> Iterator[Callable[[TensorSpec], FloatArray]]:
    """What the site wants to add to the global adapter, by tensor: what it learned, and what it still has to add."""
    manifest, values = model.manifest(), model.values()
    with ExitStack() as stack:
        base = stack.enter_context(AdapterReader(adapter, manifest))
        residual_reader = stack.enter_context(AdapterReader(residual, manifest)) if residual else None

        def difference(spec: TensorSpec) -> FloatArray:
            learned = values(spec) - base.tensor(spec)
            return learned + residual_reader.tensor(spec) if residual_reader else learned

        yield difference
