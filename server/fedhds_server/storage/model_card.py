"""The model card of the global adapter: how it was made, what was measured, what is promised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from fedhds.evaluation import label_of
from fedhds.settings import settings_of
from fedhds.spec import RunSpec
from fedhds.tensors.manifest import StopToken
from fedhds_server.aggregation import AGGREGATORS

# No dot first: ../model is a path.
_WEIGHTED = {"rows": "by rows", "equal": "equally"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What the card says of a run besides its specification; `samples` counts distinct rows of `rows`."""

    rounds: int
    sites: int
    rows: int
    samples: int
    fingerprint: Mapping[str, str]
    version: str
    evaluations: Mapping[int, tuple[int, Mapping[str, float]]]
    """By round (0: before the first): rows, and means by metric."""
    stop_tokens: tuple[StopToken, ...] = ()
    """What ends an answer, the one that training puts there first."""
    medians: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """By round and metric, over evaluators; rounds that only one evaluated have none."""
    validations: Mapping[int, tuple[int, Mapping[str, float]]] = field(default_factory=dict)
    """As `evaluations`, on the rows that chose the best round."""
    best_round: int | None = None
    """The round with the lowest validation loss; None where no site validated."""


def model_card(spec: RunSpec, facts: CardFacts) -> str:
    """Markdown behind the YAML front matter that the Hugging Face hub reads."""
    model, rounds, selection, training = spec.model, spec.rounds, spec.selection, spec.training
    front = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fedhds", "federated-learning", "instruction-tuning", spec.peft.method],
        "license": "other" if model.license == "not declared" else model.license,
    }
    if _HUB_ID.fullmatch(model.name):
        front["base_model"] = model.name
    share = f"{facts.samples / facts.rows:.1%}" if facts.rows else "none"
    released = selection.strategy.released
    optimizer = spec.aggregation.optimizer
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=True).strip(),
            "---",
            "",
            "# Adapter tuned by a federation",
            "",
            f"An adapter for `{model.name}`, tuned with fedhds {facts.version} on instruction data of",
            f"{facts.sites} sites. The data never left them; they sent adapter tensors"
            + (f" and {released}." if released else "."),
            "",
            "## How it was made",
            "",
            "| | |",
            "| --- | --- |",
            f"| rounds | {facts.rounds} of {rounds.count}, cohort fraction {rounds.cohort_fraction:g} |",
            f"| selection | {selection.strategy.name}, {selection.schedule}, budget {selection.budget} |",
            f"| rows trained on | {facts.samples} of {facts.rows} ({share}) |",
            f"| PEFT method | {_method(spec)} |",
            f"| training | {'AdamW' if training.weight_decay else 'Adam'}, learning rate {training.learning_rate:g}, "
            f"{training.lr_schedule} schedule, batch {training.batch_size}, {training.amount}, rows up to "
            f"{model.max_length} tokens |",
            f"| aggregation | {AGGREGATORS[spec.aggregation.aggregator.name].description}, "
            f"weighted {_WEIGHTED[spec.aggregation.weight_by]} |",
            f"| server optimizer | {optimizer.name}: {optimizer.summary} |",
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
            *_validation_lines(facts),
            "## Privacy",
            "",
            *filter(None, [selection.strategy.privacy_note(spec)]),
            "Adapter updates carried no noise: no differential-privacy guarantee is claimed for the adapter.",
            "",
            "## Licenses, as declared by the operator",
            "",
            f"- base model: {model.license}",
            f"- data: {model.data_license}",
            "",
            "## Use",
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({model.name!r})",
            *_stop_lines(facts),
            'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
            "```",
            "",
            f"Prompts were built with the format `{model.prompt_format}`; use the same one.",
            *_ends(facts),
            "",
        ]
    )


def _method(spec: RunSpec) -> str:
    """The PEFT method with its parameters, whatever they are."""
    parts = [spec.peft.method]
    for setting in settings_of(type(spec.peft)):
        name = setting.path[-1]
        if name != "method":
            value = getattr(spec.peft, name)
            text = ", ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
            parts.append(f"{name} {text}")
    return ", ".join(parts)


def _stop_lines(facts: CardFacts) -> list[str]:
    ids = [token.id for token in facts.stop_tokens]
    return [f"model.generation_config.eos_token_id = {ids}"] if ids else []


def _ends(facts: CardFacts) -> list[str]:
    if not facts.stop_tokens:
        return []
    first, *others = (f"`{token.text}` ({token.id})" if token.text else str(token.id) for token in facts.stop_tokens)
    more = f", or at {', '.join(others)}" if others else ""
    return [
        f"Every answer was trained to end with the token {first}. Stop generation there{more}:",
        "`generation_config.json` says so, but PEFT does not read it from this folder.",
    ]


def _validation_lines(facts: CardFacts) -> list[str]:
    if facts.best_round is None:
        return []
    best = "before the first round" if not facts.best_round else f"after round {facts.best_round}"
    own = "; this is that adapter" if facts.best_round == facts.rounds else f"; this adapter is after {facts.rounds}"
    lines = facts.validations.items()
    losses = [f"| {number or 'before'} | {rows} | {means['loss']:.4f} |" for number, (rows, means) in lines]
    return [
        "## Validation",
        "",
        "Rows of sites that neither train nor count in the evaluation above; their loss chose the best round.",
        f"It was lowest {best}{own}.",
        "",
        f"| round | rows | {label_of('loss')} |",
        "| --- | --- | --- |",
        *losses,
        "",
    ]


def _evaluation_lines(facts: CardFacts) -> list[str]:
    if not facts.evaluations:
        return ["No site evaluated."]
    metrics = sorted({metric for _, means in facts.evaluations.values() for metric in means})
    rows = []
    for number, (count, means) in facts.evaluations.items():
        values = [f"{means[metric]:.4f}" if metric in means else "" for metric in metrics]
        if facts.medians:
            # The mean of a single evaluator is its median, too.
            medians = facts.medians.get(number, means)
            values += [f"{medians[metric]:.4f}" if metric in medians else "" for metric in metrics]
        rows.append(f"| {' | '.join([str(number or 'before'), str(count), *values])} |")
    labels = [label_of(metric) for metric in metrics]
    head = ["round", "rows", *labels, *(f"{label}, median of evaluators" for label in labels if facts.medians)]
    return [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |", *rows]
