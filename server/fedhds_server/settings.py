"""The coordinator's settings: the run's specification, and where and how it is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, model_validator

from fedhds.lloyd import all_passes
from fedhds.runspec import RunSpec
from fedhds.settings import check_http, is_loopback
from fedhds.telemetry import LogFormat, LogLevel


class ServerSettings(RunSpec):
    """Settings of `fedhds-server`."""

    epsilon: float | None = Field(
        None,
        gt=0,
        description="Choose the noise so that a site's releases for selection in the whole run cost at most this "
        "epsilon at --delta (global: example-level, else client-level), in place of --noise-multiplier.",
        json_schema_extra={"group": "Privacy"},
    )
    listen: str = Field(
        "127.0.0.1:8470",
        description="Address to listen on; port 0 takes a free one. Beyond loopback it needs TLS.",
        json_schema_extra={"group": "Server"},
    )
    run_folder: Path = Field(
        Path("fedhds-run"),
        description="Folder of the run: state, artifacts, checkpoint. The same folder continues the same run.",
        json_schema_extra={"group": "Server"},
    )
    artifacts: str = Field(
        "",
        description="Keep adapters and updates here instead of in the run folder: s3://BUCKET/PREFIX or any other URL "
        "that fsspec knows, or a folder. Credentials come from the environment.",
        json_schema_extra={"group": "Server"},
    )
    keep_updates: bool = Field(
        False,
        description="Keep every site's updates, as updates/round-N/SITE.safetensors among the artifacts, when they "
        "have been folded.",
        json_schema_extra={"group": "Server"},
    )
    store: SecretStr | None = Field(
        None,
        description="Keep the run's state in this PostgreSQL database, postgresql://USER@HOST/DATABASE, in place of "
        "SQLite in the run folder; coordinators with the same one stand by for each other. Whoever may list processes "
        "reads flags: leave a password to the environment or ~/.pgpass.",
        json_schema_extra={"group": "Server"},
    )
    tls_ca: Path | None = Field(
        None,
        description="CA certificate that sites' certificates must come from.",
        json_schema_extra={"group": "Server"},
    )
    tls_cert: Path | None = Field(
        None, description="The coordinator's certificate.", json_schema_extra={"group": "Server"}
    )
    tls_key: Path | None = Field(
        None, description="Key of the coordinator's certificate.", json_schema_extra={"group": "Server"}
    )
    insecure: bool = Field(
        False,
        description="Listen beyond loopback without TLS: for gRPC, where anybody who reaches the port can join, and "
        "for --http, which has no TLS or passwords, so that anybody who reaches its port can read the sites' names, "
        "errors and results. With --tls-ca, --tls-cert and --tls-key gRPC uses TLS all the same.",
        json_schema_extra={"group": "Server"},
    )
    http: str = Field(
        "",
        description="Serve the status page, which names sites, /metrics, /healthz and /readyz over HTTP at this "
        "HOST:PORT; port 0 takes a free one.",
        json_schema_extra={"group": "Server"},
    )
    log_level: LogLevel = Field("INFO", description="Least level to log.", json_schema_extra={"group": "Server"})
    log_format: LogFormat = Field(
        "plain",
        description="Lines for people, on a terminal with colours, or JSON objects for machines.",
        json_schema_extra={"group": "Server"},
    )

    @model_validator(mode="after")
    def _servable(self) -> Self:
        host, _, port = self.listen.rpartition(":")
        if not host or not re.fullmatch("[0-9]+", port) or int(port) > 65535:
            raise ValueError(f"listen: {self.listen!r} is not HOST:PORT")
        if not is_loopback(host) and not self.tls_cert and not self.insecure:
            raise ValueError(
                f"listen: {host} is reachable from other machines and there is no TLS; give --tls-ca, --tls-cert and "
                "--tls-key (see fedhds certs), or say --insecure"
            )
        check_http(self.http, self.insecure)
        if self.epsilon is not None and self.noise_multiplier:
            raise ValueError("epsilon: it sets the noise itself; drop --noise-multiplier")
        if self.epsilon is not None and not self.clip_norm:
            raise ValueError("clip_norm: an epsilon needs a clipping norm; set it above 0")
        return self

    def run_spec(self) -> RunSpec:
        """The part that every site gets."""
        fields = {name: getattr(self, name) for name in RunSpec.model_fields}
        if self.epsilon is not None:
            from fedhds.privacy.mechanisms import calibrate_noise

            # What one selection releases, as often as a site may be asked for it.
            once = all_passes(self.released_centroids, self.lloyd_passes) if self.strategy == "global" else 1
            releases = once * (1 if self.schedule == "one-shot" else self.rounds)
            fields["noise_multiplier"] = calibrate_noise(epsilon=self.epsilon, delta=self.delta, releases=releases)
        return RunSpec(**fields)
