"""The model card of the global adapter: how it was made, what was measured, what is promised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from fedhds.evaluation import label_of
from fedhds.settings import settings_of
from fedhds.spec import RunSpec
from fedhds.spec.robust import ActiveRobustSpec
from fedhds.tensors.manifest import StopToken
from fedhds_server.aggregation import AGGREGATORS, Aggregator

_WEIGHTED = {"rows": "by rows", "tokens": "by response tokens", "equal": "equally"}
# No dot first: ../model is a path.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What the hub takes as the identifier of a license; anything else stands beside it.
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


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
    share = f"{facts.samples / facts.rows:.1%}" if facts.rows else "none"
    released = selection.released
    optimizer = spec.aggregation.optimizer
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front_matter(spec, facts), sort_keys=True).strip(),
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
            f"| aggregation | {_aggregation(spec)} |",
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
            *filter(None, [selection.privacy_note(spec)]),
            _training_privacy(spec),
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


def _front_matter(spec: RunSpec, facts: CardFacts) -> dict[str, Any]:
    """The hub's metadata. Data sets are not named: they belong to sites."""
    model = spec.model
    front: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["fedhds", "federated-learning", "instruction-tuning", spec.peft.method],
        "license": "other",
        # For `fedhds chat` and `fedhds export`.
        "prompt_format": model.prompt_format,
    }
    if _LICENSE_ID.fullmatch(model.license):
        front["license"] = model.license
    elif model.license != "not declared":
        front["license_name"] = model.license
    if _HUB_ID.fullmatch(model.name):
        front["base_model"] = model.name
    # Of this adapter alone: the scores of other rounds belong to other adapters.
    rows, means = facts.evaluations.get(facts.rounds, (0, {}))
    metrics = [
        {"type": metric, "name": label_of(metric), "value": round(mean, 6)}
        for metric, mean in sorted(means.items())
        if math.isfinite(mean)
    ]
    if facts.rounds and metrics:
        result = {
            "task": {"type": "text-generation"},
            "dataset": {"type": "private", "name": f"{rows} held-out rows of the sites, which are not published"},
            "metrics": metrics,
        }
        front["model-index"] = [{"name": "Adapter tuned by a federation", "results": [result]}]
    return front


def _aggregation(spec: RunSpec) -> str:
    """What is averaged and, where that is the run's to say, how much an update counts."""
    aggregation = spec.aggregation
    aggregator = AGGREGATORS[aggregation.aggregator.name]
    if isinstance(aggregation.robust, ActiveRobustSpec):
        return f"{aggregator.description}, robust: {aggregation.robust.summary}; all parties count the same"
    if type(aggregator).weights is not Aggregator.weights:
        # It weighs updates by itself.
        return aggregator.description
    return f"{aggregator.description}, weighted {_WEIGHTED[aggregation.weight_by]}"


def _training_privacy(spec: RunSpec) -> str:
    """What noise in training promises, if there was any."""
    training = spec.privacy.training
    if not training.noised:
        return "Adapter updates carried no noise: no differential-privacy guarantee is claimed for the adapter."
    how = f"Adapters were trained with DP-SGD: each row's gradient clipped to L2 norm {training.max_grad_norm:g},"
    if training.epsilon:
        return (
            f"{how} with the noise by which one row more or less, over all rounds of the run, costs at most epsilon "
            f"{training.epsilon:g} at delta {training.delta:g}. Every site's own ledger states what was spent."
        )
    return (
        f"{how} noise multiplier {training.noise_multiplier:g}; every site's own ledger states the example-level "
        f"epsilon at delta {training.delta:g}."
    )


def _method(spec: RunSpec) -> str:
    """The PEFT method with its parameters, whatever they are."""
    parts = [spec.peft.method]
    for setting in settings_of(type(spec.peft)):
        name = setting.path[-1]
        value = getattr(spec.peft, name)
        if value is True:
            parts.append(name)
        elif name != "method" and value is not False and value != ():
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
