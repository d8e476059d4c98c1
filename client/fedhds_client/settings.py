"""A site's settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from fedhds.encoding import escaped
from fedhds.errors import SettingsError
from fedhds.runtime.logging import LogFormat, LogLevel
from fedhds.settings import addresses, check_http
from fedhds_client.policy import SitePolicy

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "4bit"]

LEDGER = "ledger.db"


def default_state_folder() -> Path:
    """Where a user's programs keep what must survive, by the XDG base directory specification.

    Raises SettingsError for a user without a home.
    """
    base = os.path.expanduser(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    if base.startswith("~"):
        raise SettingsError("--state", "this user has no home for it; give a folder, or set HOME")
    return Path(base) / "fedhds"


class ClientSettings(BaseModel):
    """Settings of `fedhds-client`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: tuple[Path, ...] = Field(
        (),
        description="Training shards (.jsonl, .jsonl.gz, .json, .parquet); several make several sites in this process.",
        json_schema_extra={"group": "Data"},
    )
    eval_data: Path | None = Field(
        None,
        description="Held-out rows: the site (also) evaluates; with several shards, the first one's site does. What "
        "they measure is reported and decides nothing.",
        json_schema_extra={"group": "Data"},
    )
    validation_data: Path | None = Field(
        None,
        description="Rows whose loss after each round finds the run's best adapter and may end the run early; with "
        "several shards, those of the first one's site. None of them may be in --eval-data.",
        json_schema_extra={"group": "Data"},
    )
    target_data: Path | None = Field(
        None,
        description="Rows of a wanted task, of which the strategies target-features and target-gradients look for "
        "more: this site, with several shards the first one's, then releases means over groups of them. None of them "
        "may be in --eval-data.",
        json_schema_extra={"group": "Data"},
    )
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each shard's own rows that validates, as --validation-data does, and never trains; 0: "
        "all rows train.",
        json_schema_extra={"group": "Data"},
    )
    holdout_seed: int = Field(
        0,
        ge=0,
        description="Draws the rows of --holdout, equal rows together; the same seed draws the same rows.",
        json_schema_extra={"group": "Data"},
    )
    skip_bad_rows: bool = Field(
        False, description="Count rows that cannot be used, and go on.", json_schema_extra={"group": "Data"}
    )
    out: Path = Field(
        Path("fedhds-adapter"),
        description="Folder that the final adapter is written to.",
        json_schema_extra={"group": "Data"},
    )
    personalize: bool = Field(
        False,
        description="After the run, tune an adapter of this site's own on from the global one, with its own rows, and "
        "compare base model, global and personal adapter on those of --holdout or --validation-data. It is written "
        "below --out, to personal, and never leaves the site.",
        json_schema_extra={"group": "Personal"},
    )
    personal_epochs: int = Field(
        1,
        ge=1,
        description="Passes of --personalize over the site's training rows.",
        json_schema_extra={"group": "Personal"},
    )
    personal_shared_a: bool = Field(
        False,
        description="Keep LoRA's A of the global adapter, and tune B alone (the division of FedSA-LoRA).",
        json_schema_extra={"group": "Personal"},
    )
    server: str = Field(
        "localhost:8470",
        description="The coordinator's HOST:PORT; with standbys theirs too, divided by commas.",
        json_schema_extra={"group": "Link"},
    )
    name: tuple[str, ...] | None = Field(
        None,
        description="The site's name (default: with TLS the certificate's, else host name and shard's name). With "
        "several shards each site is NAME/SHARD; without TLS they may have a name each.",
        json_schema_extra={"group": "Link"},
    )
    reconnect_timeout: float = Field(
        300.0,
        gt=0,
        description="Seconds without an answer from the coordinator after which the site gives up.",
        json_schema_extra={"group": "Link"},
    )
    tls_ca: Path | None = Field(
        None, description="CA that the coordinator's certificate must come from.", json_schema_extra={"group": "Link"}
    )
    tls_cert: Path | None = Field(None, description="The site's certificate.", json_schema_extra={"group": "Link"})
    tls_key: Path | None = Field(
        None, description="Key of the site's certificate.", json_schema_extra={"group": "Link"}
    )
    model: str | None = Field(
        None,
        description="Load the base model from here (path or hub id) in place of what the run names; it must be the "
        "same.",
        json_schema_extra={"group": "Compute"},
    )
    device: Device = Field(
        "auto", description="Where to compute; auto: a GPU when there is one.", json_schema_extra={"group": "Compute"}
    )
    dtype: Dtype = Field(
        "auto",
        description="Type of the base model's weights here; adapters are float32. auto: bfloat16 where the hardware "
        "multiplies it fast (GPUs, CPUs with AMX or avx512_bf16; on a CPU from 100 million parameters on), else "
        "float32. 4bit: QLoRA, on a GPU with the package bitsandbytes.",
        json_schema_extra={"group": "Compute"},
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Compute activations again in the backward pass of training: less memory for a third more time, "
        "with the same result.",
        json_schema_extra={"group": "Compute"},
    )
    inference_batch_size: int = Field(
        16,
        ge=1,
        description="Most rows per batch when features are taken and when answers are generated; on a CPU features are "
        "taken in smaller ones, which cost no time and less memory.",
        json_schema_extra={"group": "Compute"},
    )
    max_lora_rank: int = Field(
        0,
        ge=0,
        description="Train at most this many of the directions of the run's LoRA, the strongest ones; 0: all. It takes "
        "a run with --aggregator svd, which orders them.",
        json_schema_extra={"group": "Compute"},
    )
    policy: Path | None = Field(
        None,
        description="YAML file of rules that no coordinator can override: models, methods, noise, epsilon and more; a "
        "run or a task that breaks one is refused. The flags below that are rules, too, may be in it in their place.",
        json_schema_extra={"group": "Policy"},
    )
    allow_exact_kmeans_sums: bool = Field(
        False,
        description="Take part when the strategy federated-kmeans runs without noise: it then sends, for every center, "
        "the sum of the features of this site's rows there and the distance of the nearest; a sum over one row is that "
        "row's features.",
        json_schema_extra={"group": "Policy"},
    )
    allow_feature_model: tuple[str, ...] = Field(
        (),
        description="Models that a run may have this site take features with (--feature-model of the coordinator), "
        "besides the base model: hub ids or paths.",
        json_schema_extra={"group": "Policy"},
    )
    min_cluster_rows: int = Field(
        5,
        ge=1,
        description="Fewest rows behind anything that this site says of its rows: the clusters of fedhds and "
        "fedhds-aligned, the training loss and the metrics of held-out rows. 1 consents to releases about single rows.",
        json_schema_extra={"group": "Policy"},
    )
    require_secure_sites: int = Field(
        0,
        ge=0,
        description="Fewest certificates whose sites must be in a sum before this site adds its update: it then takes "
        "part only in runs with --secure-aggregation. 0: also in runs that send updates in the clear.",
        json_schema_extra={"group": "Policy"},
    )
    selection_max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Largest epsilon that this site's releases for selection may cost, ever, in each privacy unit; "
        "more, and a release without noise, is refused whatever the coordinator asks.",
        json_schema_extra={"group": "Policy"},
    )
    stated_rows: int = Field(
        1000,
        ge=1,
        description="Training rows that this site states in a run whose noise hides the site's whole shard.",
        json_schema_extra={"group": "Policy"},
    )
    ledger: Path | None = Field(
        None,
        description="File that has what was released of which rows, by all sites and runs of this user (default "
        "~/.local/state/fedhds/ledger.db, whatever --state is; of a user without a home, in --state).",
        json_schema_extra={"group": "Policy"},
    )
    state: Path = Field(
        default_factory=default_state_folder,
        description="Folder for what must survive a restart: session, clusters, updates (default "
        "~/.local/state/fedhds).",
        json_schema_extra={"group": "Policy"},
    )
    log_level: LogLevel = Field("INFO", description="Least level to log.", json_schema_extra={"group": "Policy"})
    log_format: LogFormat = Field(
        "plain",
        description="Lines for people, on a terminal with colors and progress bars, or JSON objects for machines.",
        json_schema_extra={"group": "Policy"},
    )
    http: str = Field(
        "",
        description="Serve /metrics, /healthz and /readyz over HTTP at this HOST:PORT; port 0 takes a free one.",
        json_schema_extra={"group": "Metrics"},
    )
    insecure: bool = Field(
        False,
        description="Listen beyond loopback with --http although it has neither TLS nor passwords: anybody who reaches "
        "the port can read it.",
        json_schema_extra={"group": "Metrics"},
    )

    _rules: SitePolicy = PrivateAttr(default_factory=SitePolicy)

    @property
    def rules(self) -> SitePolicy:
        """The site's policy: the file's rules and those of flags."""
        return self._rules

    def model_post_init(self, context: Any) -> None:
        """Reads the policy; raises SettingsError."""
        flags = {name: getattr(self, name) for name in self.model_fields_set & SitePolicy.model_fields.keys()}
        self._rules = SitePolicy.read(self.policy, flags)

    @property
    def ledger_file(self) -> Path:
        """Where the ledger is."""
        if self.ledger:
            return self.ledger
        try:
            return default_state_folder() / LEDGER
        except SettingsError:
            return self.state / LEDGER

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if not self.data and not self.eval_data and not self.validation_data:
            raise ValueError("data: give the training shard with --data, or held-out rows with --eval-data")
        if self.target_data and not self.data:
            raise ValueError("target_data: only a site with rows to train on can say what it looks for; give --data")
        if self.holdout and self.validation_data:
            raise ValueError("holdout: rows to validate on are in --validation-data already; drop one of the two")
        if self.holdout and not self.data:
            raise ValueError("holdout: takes a share of --data, and there is none; use --validation-data")
        if self.personalize and not (self.data and (self.holdout or self.validation_data)):
            raise ValueError("personalize: needs --data, and rows to compare on; give --holdout or --validation-data")
        if self.personalize and len(self.data) > 1 and not self.holdout:
            raise ValueError(
                "personalize: with several shards each needs rows of its own to compare on; give --holdout"
            )
        names = [path.name.split(".")[0] for path in self.data]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"data: two shards are called {escaped(twice)}; sites are named after them, rename one")
        check_http(self.http, self.insecure)
        try:
            addresses(self.server)
        except ValueError as error:
            raise ValueError(f"server: {error}") from None
        return self
