"""The last global adapter as a PEFT folder with a model card, whole at every instant."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from fedhds.errors import StorageError
from fedhds.runspec import RunSpec
from fedhds.runtime.files import sync

# No dot first: ../model is a path.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class EvaluationFacts:
    """What the evaluators measured after `round` (0: before the first); loss in nats per response token."""

    round: int
    rows: int
    loss: float
    rouge_l: float


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the card says of a run besides its specification; `samples` counts distinct rows of `rows`."""

    rounds: int
    sites: int
    rows: int
    samples: int
    fingerprint: Mapping[str, str]
    version: str
    evaluations: tuple[EvaluationFacts, ...]


def write_checkpoint(folder: Path, adapter: Path, config: str, card: str) -> None:
    """Makes `folder/checkpoint` a link to a new complete folder and removes the one before; raises StorageError.

    The link is swapped by a rename, so that a reader, or a crash at any instant, finds one whole version.
    """
    link, versions = folder / "checkpoint", folder / "checkpoints"
    try:
        versions.mkdir(exist_ok=True)
        current = os.readlink(link) if link.is_symlink() else ""
        # Two names that take turns: the one that is not linked may be half-written and is overwritten.
        version = versions / ("b" if current.endswith("a") else "a")
        shutil.rmtree(version, ignore_errors=True)
        version.mkdir()
        (version / "adapter_config.json").write_text(config, encoding="utf-8")
        (version / "README.md").write_text(card, encoding="utf-8")
        shutil.copyfile(adapter, version / "adapter_model.safetensors")
        for file in version.iterdir():
            sync(file)
        sync(version)
        sync(versions)
        partial = folder / "checkpoint.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(Path("checkpoints") / version.name)
        partial.replace(link)
        sync(folder)
        if current:
            shutil.rmtree(folder / current, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write the checkpoint to {folder}: {error.strerror or error}; make room there"
        ) from error


def model_card(spec: RunSpec, facts: RunFacts) -> str:
    """The model card: Markdown behind the YAML front matter that the Hugging Face hub reads."""
    front = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fedhds", "federated-learning", "instruction-tuning", "lora"],
        "license": "other" if spec.model_licence == "not declared" else spec.model_licence,
    }
    if _HUB_ID.fullmatch(spec.model):
        front["base_model"] = spec.model
    share = f"{facts.samples / facts.rows:.1%}" if facts.rows else "none"
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=True).strip(),
            "---",
            "",
            "# LoRA adapter tuned by a federation",
            "",
            f"An adapter for `{spec.model}`, tuned with fedhds {facts.version} on instruction data of",
            f"{facts.sites} sites. The data never left them; they sent adapter tensors"
            + (f" and {_RELEASED[spec.strategy]}." if spec.strategy in _RELEASED else "."),
            "",
            "## How it was made",
            "",
            "| | |",
            "| --- | --- |",
            f"| rounds | {facts.rounds} of {spec.rounds}, cohort fraction {spec.cohort_fraction:g} |",
            f"| selection | {spec.strategy}, {spec.schedule}, budget {spec.budget} |",
            f"| rows trained on | {facts.samples} of {facts.rows} ({share}) |",
            f"| LoRA | rank {spec.lora_rank}, alpha {spec.lora_alpha:g}, dropout {spec.lora_dropout:g}, "
            f"{', '.join(spec.lora_targets)} |",
            f"| training | Adam, learning rate {spec.learning_rate:g}, batch {spec.batch_size}, "
            f"{spec.local_epochs} local epochs, rows up to {spec.max_length} tokens |",
            "| aggregation | FedAvg of A and of B, weighted by rows |",
            f"| seed | {spec.seed} |",
            *[
                f"| SHA-256 of the base model's {part} | `{digest}` |"
                for part, digest in sorted(facts.fingerprint.items())
            ],
            "",
            "## Evaluation on held-out tasks",
            "",
            *_evaluation_lines(facts),
            "",
            "## Privacy",
            "",
            *_privacy_lines(spec),
            "",
            "## Licences, as declared by the operator",
            "",
            f"- base model: {spec.model_licence}",
            f"- data: {spec.data_licence}",
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({spec.model!r})",
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            "```",
            "",
            f"Prompts were built with the format `{spec.prompt_format}`; use the same one.",
            "",
        ]
    )


def _evaluation_lines(facts: RunFacts) -> list[str]:
    if not facts.evaluations:
        return ["No site evaluated."]
    rows = [
        f"| {line.round or 'before'} | {line.rows} | {line.loss:.4f} | {line.rouge_l:.4f} |"
        for line in facts.evaluations
    ]
    return ["| round | rows | loss (nats per response token) | Rouge-L F1 |", "| --- | --- | --- | --- |", *rows]


# What sites send for selection, by strategy.
_RELEASED = {
    "fedhds": "cluster centroids",
    "fedhds-aligned": "cluster centroids",
    "global": "sums and counts over cells of features",
}


def _privacy_lines(spec: RunSpec) -> list[str]:
    lines = []
    released = _RELEASED.get(spec.strategy)
    if released and spec.noised:
        unit = "example" if spec.strategy == "global" else "client"
        what = "Rows' features" if spec.strategy == "global" else "Released centroids"
        sums = "their sums and counts " if spec.strategy == "global" else ""
        lines.append(
            f"{what} were clipped to L2 norm {spec.clip_norm:g} and {sums}noised (Gaussian, noise multiplier "
            f"{spec.noise_multiplier:.4g}); every site's own ledger states the {unit}-level epsilon at "
            f"delta {spec.delta:g}."
        )
    elif released:
        lines.append(f"Released {released} carried no noise: no differential-privacy guarantee is claimed for them.")
    lines.append("Adapter updates carried no noise: no differential-privacy guarantee is claimed for the adapter.")
    return lines
