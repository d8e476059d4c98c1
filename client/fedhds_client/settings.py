"""A site's settings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedhds.encoding import escaped
from fedhds.errors import SettingsError
from fedhds.runtime.logging import LogFormat, LogLevel
from fedhds.settings import addresses, check_http

Device = Literal["auto", "cpu", "cuda"]


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
        description="Held-out rows: the site (also) evaluates; with several shards, the first one's site does.",
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
    inference_batch_size: int = Field(
        16,
        ge=1,
        description="Most rows per batch when features are taken and when answers are generated; on a CPU features are "
        "taken in smaller ones, which cost no time and less memory.",
        json_schema_extra={"group": "Compute"},
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
    selection_max_epsilon: float | None = Field(
        None,
        gt=0,
        description="Largest epsilon that this site's releases for selection may cost, ever, in each privacy unit; "
        "more, and a release without noise, is refused whatever the coordinator asks.",
        json_schema_extra={"group": "Policy"},
    )
    state: Path = Field(
        default_factory=default_state_folder,
        description="Folder for what must survive a restart: session, ledger, clusters (default "
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

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if not self.data and not self.eval_data:
            raise ValueError("data: give the training shard with --data, or held-out rows with --eval-data")
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
