"""What a run is: the one frozen, typed specification that the coordinator fixes and every site follows."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, Self

from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedhds.tensors.codecs import CODECS
from fedhds.tensors.safetensors import AdapterDtype
from fedhds.v1 import runspec_pb2

WireDtype = Literal[AdapterDtype, "int8"]
PromptFormat = Literal["auto", "chat", "alpaca"]
Strategy = Literal["full", "random", "fedhds", "fedhds-aligned", "global"]
Schedule = Literal["one-shot", "per-round"]
Fusion = Literal["tsne", "umap", "pca", "kpca", "none"]
FeaturePooling = Literal["auto", "last", "mean"]


# The share of the paper's headline.
AUTO_BUDGET = "1.5%"


def budget_rows(budget: str, pool: int) -> int | None:
    """Rows that `budget` allows of `pool` rows: a count as it is, a share rounded up; None for "auto"."""
    if budget == "auto":
        return None
    if budget.endswith("%"):
        # A share is met by the next whole row; the small slack keeps 1.5 % of 200 at 3 despite binary floats.
        return min(pool, math.ceil(pool * float(budget[:-1]) / 100 - 1e-9))
    return min(pool, int(budget))


def shared_space(spec: RunSpec) -> bool:
    """Whether the run's features must compare between sites."""
    return spec.strategy in ("fedhds-aligned", "global")


class RunSpec(BaseModel):
    """The specification of one run. Descriptions are the reference that `--help` and the docs are made from."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[str, Field(min_length=1)] = Field(
        description="Base model: a hub id or a local path. Sites may load the same weights from elsewhere.",
        json_schema_extra={"group": "Model"},
    )
    model_revision: str = Field(
        "",
        description="Revision of a hub model (branch, tag or commit).",
        json_schema_extra={"group": "Model"},
    )
    model_licence: str = Field(
        "not declared",
        description="Licence of the base model, for the model card.",
        json_schema_extra={"group": "Model"},
    )
    data_licence: str = Field(
        "not declared",
        description="Licence of the sites' data, for the model card.",
        json_schema_extra={"group": "Model"},
    )
    prompt_format: PromptFormat = Field(
        "auto",
        description="How a row becomes a prompt: the tokenizer's chat template, the Alpaca template, or auto: "
        "the former when there is one.",
        json_schema_extra={"group": "Model"},
    )
    max_length: int = Field(
        1024,
        ge=16,
        description="Longest row in tokens; longer rows are truncated, counted and said. The model's own limit "
        "applies when it is smaller.",
        json_schema_extra={"group": "Model"},
    )

    lora_rank: int = Field(8, ge=1, le=1024, description="LoRA rank.", json_schema_extra={"group": "Adapter"})
    lora_alpha: float = Field(
        16.0,
        gt=0,
        description="LoRA scale numerator (the scale is alpha / rank).",
        json_schema_extra={"group": "Adapter"},
    )
    lora_dropout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input.",
        json_schema_extra={"group": "Adapter"},
    )
    lora_targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="Modules that get an adapter, by the last part of their name, or all-linear.",
        json_schema_extra={"group": "Adapter"},
    )
    wire_dtype: WireDtype = Field(
        "float32",
        description="Tensor type of adapters on the wire. int8: sites send the difference to the global adapter in 8 "
        "bits, and what was rounded away with the next one; the global adapter itself is float32.",
        json_schema_extra={"group": "Adapter"},
    )

    rounds: int = Field(ge=1, description="Number of aggregation rounds.", json_schema_extra={"group": "Training"})
    cohort_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the enrolled training sites drawn into each round (at least one).",
        json_schema_extra={"group": "Training"},
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="Adam's learning rate.", json_schema_extra={"group": "Training"}
    )
    local_epochs: int = Field(
        1, ge=1, description="Passes over the coreset in one round.", json_schema_extra={"group": "Training"}
    )
    batch_size: int = Field(4, ge=1, description="Rows per optimiser step.", json_schema_extra={"group": "Training"})
    max_grad_norm: float = Field(
        1.0,
        ge=0,
        description="Largest gradient norm, 0 for no limit.",
        json_schema_extra={"group": "Training"},
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="Seed of cohorts, initial adapter, data order and dropout; never of privacy noise.",
        json_schema_extra={"group": "Training"},
    )

    strategy: Strategy = Field(
        "fedhds-aligned",
        description="Which rows train: full (FedIT, all), random (a uniform draw of --budget rows), fedhds (two "
        "layers of clustering, each site in a frame of its own, as published), fedhds-aligned (the same in a space "
        "that all sites share) or global (federated k-means in that space).",
        json_schema_extra={"group": "Selection"},
    )
    schedule: Schedule = Field(
        "one-shot",
        description="Select once before the first round, or anew in every round for its cohort.",
        json_schema_extra={"group": "Selection"},
    )
    budget: str = Field(
        "auto",
        description="Rows to train on, of all enrolled sites' rows (per-round: of the cohort's): a count, a share "
        "such as 1.5%, or auto: 1.5%, but for full, which takes all, and fedhds: a row of each group that the paper's "
        "rule finds, which may be very few. Met exactly; under noise an upper bound.",
        json_schema_extra={"group": "Selection"},
    )
    fusion: Fusion = Field(
        "tsne",
        description="Reduction of the features before a site clusters them.",
        json_schema_extra={"group": "Selection"},
    )
    min_cluster_size: int = Field(
        2, ge=2, description="Smallest cluster at a site, in rows.", json_schema_extra={"group": "Selection"}
    )
    feature_layers: str = Field(
        "all",
        description="Layers whose hidden states are a row's features: all, last, or numbers such as 0,6,-1, where 0 is "
        "the embeddings' output.",
        json_schema_extra={"group": "Selection"},
    )
    feature_pooling: FeaturePooling = Field(
        "auto",
        description="Hidden state of a row's last token, or the mean over its tokens; auto: last for fedhds, as "
        "published, and mean for strategies that compare sites, where it covers the pool better.",
        json_schema_extra={"group": "Selection"},
    )
    feature_dimension: int = Field(
        256,
        ge=2,
        le=8192,
        description="Values per row after the seeded random projection that every site derives alike.",
        json_schema_extra={"group": "Selection"},
    )
    feature_model: str = Field(
        "",
        description="Take features with this model (hub id or path; any small causal model or encoder) in place of "
        "the one that is tuned.",
        json_schema_extra={"group": "Selection"},
    )
    lloyd_passes: int = Field(
        5,
        ge=1,
        le=100,
        description="Passes of the strategy global over all sites with all of its centres.",
        json_schema_extra={"group": "Selection"},
    )

    clip_norm: float = Field(
        0.0,
        ge=0,
        description="Clip every released centroid (global: every row's features, of norm 1) to this L2 norm, 0 for no "
        "clipping; noise needs it.",
        json_schema_extra={"group": "Privacy"},
    )
    noise_multiplier: float = Field(
        0.0,
        ge=0,
        description="Noise on released centroids, or sums and counts: standard deviation over the release's L2 "
        "sensitivity.",
        json_schema_extra={"group": "Privacy"},
    )
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="Delta of the guarantee.",
        json_schema_extra={"group": "Privacy"},
    )
    released_centroids: int = Field(
        16,
        ge=1,
        le=4096,
        description="Under noise, every site releases exactly this many centroids (padded); global: the number of "
        "centres.",
        json_schema_extra={"group": "Privacy"},
    )

    min_sites: int = Field(
        2,
        ge=1,
        description="Training sites that must be enrolled before the run starts.",
        json_schema_extra={"group": "Rounds"},
    )
    min_evaluators: int = Field(
        0,
        ge=0,
        description="Evaluators that must be enrolled before the run starts.",
        json_schema_extra={"group": "Rounds"},
    )
    quorum: str = Field(
        "1",
        description="Least answers of a cohort with which a selection or a round closes, a count or a share such as "
        "80%; until then it waits, whatever happens.",
        json_schema_extra={"group": "Rounds"},
    )
    deadline: float = Field(
        0.0,
        ge=0,
        description="Seconds after which a selection or a round closes with its quorum, without waiting for those who "
        "still work; 0: it waits for all that give signs of life. A coordinator that starts again counts anew.",
        json_schema_extra={"group": "Rounds"},
    )
    oversample: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Draw so many more sites into a round, as a share of its cohort; it closes with as many updates "
        "as the cohort without them.",
        json_schema_extra={"group": "Rounds"},
    )
    max_weight_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Largest share of a round's weight that one site's update may have, whatever rows it declares; 1 "
        "divided by the number of updates where that is more. The strategy random asks no site for a larger share of "
        "its budget while others have rows left.",
        json_schema_extra={"group": "Rounds"},
    )
    max_update_norm: float = Field(
        0.0,
        ge=0,
        description="Reject updates that differ from the round's adapter by more than this L2 norm; 0: any finite one "
        "is taken.",
        json_schema_extra={"group": "Rounds"},
    )
    patience: float = Field(
        60.0,
        gt=0,
        description="Seconds without any sign of life after which a site is taken for lost.",
        json_schema_extra={"group": "Rounds"},
    )
    evaluate_every: int = Field(
        5,
        ge=0,
        description="Evaluate every so many rounds, besides before the first and after the last; 0: only these.",
        json_schema_extra={"group": "Rounds"},
    )
    max_new_tokens: int = Field(
        128,
        ge=1,
        description="Most tokens generated per row in an evaluation.",
        json_schema_extra={"group": "Rounds"},
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is not finite")
            if isinstance(value, int) and name != "seed" and value >= 2**32:
                raise ValueError(f"{name}: {value} is too large; the limit is {2**32 - 1}")
        match = re.fullmatch(r"auto|[1-9]\d*|(\d+(?:\.\d+)?)%", self.budget)
        if not match or (match[1] and not 0 < float(match[1]) <= 100):
            raise ValueError(f"budget: {self.budget!r} is neither auto, a count from 1, nor a share up to 100%")
        share = re.fullmatch(r"[1-9]\d*|(\d+(?:\.\d+)?)%", self.quorum)
        if not share or (share[1] and not 0 < float(share[1]) <= 100):
            raise ValueError(f"quorum: {self.quorum!r} is neither a count from 1 nor a share up to 100%")
        if self.noise_multiplier and not self.clip_norm:
            raise ValueError("clip_norm: noise needs a clipping norm, else its guarantee is void; set it above 0")
        if not re.fullmatch(r"all|last|-?\d+(,-?\d+)*", self.feature_layers):
            raise ValueError(
                f"feature_layers: {self.feature_layers!r} is neither all, last, nor numbers such as 0,6,-1"
            )
        if self.strategy == "full" and self.budget != "auto":
            raise ValueError(f"budget: the strategy full trains on all rows; drop the budget {self.budget!r}")
        return self

    def budget_of(self, pool: int) -> int | None:
        """Rows to train on of `pool` rows; None where the strategy itself says: full, and fedhds left to its rule."""
        if self.budget == "auto" and self.strategy not in ("full", "fedhds"):
            return budget_rows(AUTO_BUDGET, pool)
        return budget_rows(self.budget, pool)

    def quorum_of(self, cohort: int) -> int:
        """Least answers that close a selection or round of `cohort` sites."""
        if self.quorum.endswith("%"):
            return max(1, budget_rows(self.quorum, cohort) or 0)
        return int(self.quorum)

    @property
    def adapter_dtype(self) -> AdapterDtype:
        """Tensor type of the global adapter: the wire type, but float32 where only updates are quantized."""
        return CODECS[self.wire_dtype].adapter_dtype

    @property
    def noised(self) -> bool:
        """Whether centroids are noised before they leave a site."""
        return self.noise_multiplier > 0

    def to_proto(self) -> runspec_pb2.RunSpec:
        """The same specification as a wire message."""
        return json_format.ParseDict(self.model_dump(mode="json"), runspec_pb2.RunSpec())

    @classmethod
    def from_proto(cls, message: runspec_pb2.RunSpec) -> RunSpec:
        """Reads a wire message; raises pydantic.ValidationError for values outside their range."""
        fields: dict[str, Any] = json_format.MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return cls.model_validate(fields)
