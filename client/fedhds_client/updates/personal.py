"""A site's own adapter after the run: tuned on from the global one, and compared with it on rows that did not train.

Tuning on is local fine-tuning; with `shared_a`, LoRA's A stays that of the federation and B alone becomes the site's,
the division of FedSA-LoRA (Guo et al. 2024).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhds.errors import StorageError, TaskError
from fedhds.evaluation import label_of
from fedhds.runtime.files import replace_file
from fedhds.tensors.artifact import Artifact
from fedhds_client.state_files import file_key
from fedhds_client.updates.delivery import CARD, write_adapter_folder

if TYPE_CHECKING:
    from fedhds_client.computation import Control
    from fedhds_client.executor import RunModels
    from fedhds_client.site import Site

logger = logging.getLogger(__name__)

_NOTE = "personal.json"
# Shares of the whole: measuring the base model, the global adapter, tuning, measuring the result.
_STEPS = {"base": (0.0, 0.2), "global": (0.2, 0.2), "tuning": (0.4, 0.4), "personal": (0.8, 0.2)}


@dataclass(frozen=True)
class PersonalJob:
    """What a site still has to do after a run: durable from before the coordinator hears that the adapter is here."""

    run_id: str
    spec: str
    """Of the run, as JSON."""
    digest: str
    """Of the global adapter as the coordinator sent it."""

    @classmethod
    def pending(cls, folder: Path) -> PersonalJob | None:
        """The job in a site's state folder; None when there is none, or it is damaged."""
        path = folder / _NOTE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
        except (OSError, ValueError, TypeError) as error:
            logger.warning("the note on a personal adapter in %s is damaged (%s)", path, type(error).__name__)
            return None

    def keep(self, folder: Path) -> None:
        """Makes the job durable; raises StorageError."""
        replace_file(folder / _NOTE, json.dumps(asdict(self)), private=True)

    @staticmethod
    def done(folder: Path) -> None:
        """Nothing is left to do."""
        (folder / _NOTE).unlink(missing_ok=True)


@dataclass(frozen=True)
class PersonalSettings:
    """How a site tunes on."""

    epochs: int
    shared_a: bool
    batch_size: int
    """Rows per batch when answers are generated."""


def personalize(
    models: RunModels,
    site: Site,
    job: PersonalJob,
    settings: PersonalSettings,
    *,
    adapter: Path,
    out: Path,
    target: Path,
    control: Control,
) -> dict[str, dict[str, float]]:
    """Writes the personal adapter to `target`, a PEFT folder with report.json; the metrics of base, global, personal.

    `adapter` is the global one as it was sent, `out` the folder where it was delivered, which stays as it is. All of
    the site's training rows tune, in the run's way; its validation rows compare. Raises Cancelled, TaskError,
    StorageError.
    """
    from fedhds_client.evaluation.evaluate import evaluate
    from fedhds_client.training.loop import train

    shard, rows, model, spec = site.shard, site.validation, models.model, models.spec
    if shard is None or rows is None:
        raise TaskError("a personal adapter needs rows to tune on and rows to compare on; give --data and --holdout")
    if not adapter.exists() or Artifact.of_file(adapter).digest != job.digest:
        raise TaskError(f"the global adapter of the run {job.run_id} is no longer in {adapter.parent}")
    roles = model.manifest().roles - ({"lora_A"} if settings.shared_a else set())
    if settings.shared_a and roles != {"lora_B"}:
        raise TaskError("--personal-shared-a needs an adapter of LoRA's factors A and B; leave it out")
    scores: dict[str, dict[str, float]] = {}

    def measure(name: str, context: AbstractContextManager[Any] | None = None) -> None:
        with context or nullcontext():
            sums = evaluate(
                model,
                rows,
                models.prompter,
                max_new_tokens=spec.evaluation.max_new_tokens,
                batch_size=settings.batch_size,
                progress=_part(control, name),
                cancelled=control.cancelled,
            )
        scores[name] = sums.means

    model.load(adapter)
    measure("base", model.module.disable_adapter())
    measure("global")
    outcome = train(
        model,
        shard,
        range(len(shard)),
        models.prompter,
        spec.training.model_copy(update={"local_epochs": settings.epochs, "local_steps": 0, "proximal_mu": 0.0}),
        seed=spec.seed + int(file_key(f"personal/{site.name}")[:12], 16),
        trainable_roles=roles if settings.shared_a else frozenset(),
        progress=_part(control, "tuning"),
        cancelled=control.cancelled,
    )
    measure("personal")
    tuned, converted = site.folder / "personal.safetensors", site.folder / "personal-peft.safetensors"
    try:
        model.save(tuned)
        file = spec.peft.peft_file(tuned, model.manifest(), converted)
        texts = [(out / name).read_text(encoding="utf-8") for name in (CARD, "adapter_config.json")]
        generation = out / "generation_config.json"
        ends = generation.read_text(encoding="utf-8") if generation.exists() else ""
        report = {"run_id": job.run_id, "rows": outcome.samples, "compared_on": len(rows), "metrics": scores}
        replace_file(target / "report.json", json.dumps(report, indent=2) + "\n", shared=True)
        write_adapter_folder(target, file, texts[1], _card(texts[0], report, settings), ends)
    except OSError as error:
        raise StorageError(f"cannot write the personal adapter: {error}; make room there") from error
    finally:
        for path in (tuned, converted):
            path.unlink(missing_ok=True)
    return scores


def _part(control: Control, step: str) -> Callable[[float], None]:
    begin, length = _STEPS[step]
    return lambda share: control.report(begin + length * share)


def _card(card: str, report: dict[str, Any], settings: PersonalSettings) -> str:
    """The model card: the front matter of the global adapter's, and how this one came to be."""
    front = card.split("---\n")[1] if card.startswith("---\n") else ""
    scores: dict[str, dict[str, float]] = report["metrics"]
    metrics = list(scores["base"])
    lines = [
        f"| {name} | {' | '.join(f'{values[metric]:.4f}' for metric in metrics)} |" for name, values in scores.items()
    ]
    what = "LoRA's B alone, A stays the federation's" if settings.shared_a else "all of its tensors"
    return "\n".join(
        [
            *(["---", front.strip(), "---", ""] if front else []),
            "# Personal adapter of one site",
            "",
            f"Tuned on from the global adapter of the run `{report['run_id']}` ({what}): {settings.epochs} epochs on",
            f"{report['rows']} rows of one site. It holds what these rows taught it, without any noise: share it",
            "where you would share them.",
            "",
            f"On {report['compared_on']} rows of the site that did not train, and validated the run:",
            "",
            f"| | {' | '.join(map(label_of, metrics))} |",
            f"|{' --- |' * (len(metrics) + 1)}",
            *lines,
            "",
        ]
    )
