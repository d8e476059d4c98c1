"""The coordinator's settings: the run's specification, and where and how it is served."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from pydantic import SecretStr, field_validator, model_validator

from fedhds.encoding import escaped, not_utf_8
from fedhds.errors import SettingsError
from fedhds.fingerprint import is_digest
from fedhds.runtime.logging import LogFormat, LogLevel
from fedhds.settings import Parameters, check_http, host_and_port, is_loopback, parameter
from fedhds.spec import RunSpec


class ServerSettings(Parameters):
    """Settings of `fedhds-server`."""

    run: RunSpec
    selection_epsilon: float | None = parameter(
        None,
        "Choose the noise so that a site's releases for selection in the whole run cost at most this epsilon at "
        "--selection-delta (federated-kmeans: example-level, else client-level), instead of "
        "--selection-noise-multiplier.",
        group="Privacy",
        gt=0,
    )
    listen: str = parameter(
        "127.0.0.1:8470",
        "Address to listen on; port 0 takes a free one. Beyond loopback it needs TLS.",
        group="Server",
    )
    run_folder: Path = parameter(
        Path("fedhds-run"),
        "Folder of the run: state, artifacts, checkpoint. The same folder continues the same run.",
        group="Server",
    )
    artifacts: str = parameter(
        "",
        "Keep adapters and updates here instead of in the run folder: s3://BUCKET/PREFIX or any other URL that fsspec "
        "knows, or a folder. Credentials come from the environment.",
        group="Server",
    )
    keep_updates: bool = parameter(
        False,
        "Keep each site's updates after aggregation, as updates/round-N/SITE.safetensors among the artifacts.",
        group="Server",
    )
    store: SecretStr | None = parameter(
        None,
        "Keep the run's state in this PostgreSQL database, postgresql://USER@HOST/DATABASE, instead of SQLite in the "
        "run folder; coordinators with the same database stand by for each other. Flags are visible to everybody who "
        "can list processes: put a password in the environment or ~/.pgpass.",
        group="Server",
    )
    max_shards: int = parameter(
        1,
        "Most sites that one certificate (without TLS: one name before the '/') may enroll: with 1 only NAME itself, "
        "with more also NAME/SHARD, as a site with several --data does. All of them count as one in --min-sites, "
        "quorums, cohorts and weights.",
        group="Sites",
        ge=1,
        le=10_000,
    )
    max_rows_per_site: int = parameter(
        1_000_000,
        "Most rows that the sites of one certificate may declare, for training and for evaluation each. Nobody can "
        "check them, and what a share in --selection-budget is taken of grows with them.",
        group="Sites",
        ge=1,
        le=10**8,
    )
    expected_fingerprint: str = parameter(
        "",
        "Fingerprint of the base model, from `fedhds fingerprint MODEL`; sites with another one are refused. Without "
        "it the first site to register decides, until `fedhds confirm-model`.",
        group="Sites",
    )
    allow_sites: Path | None = parameter(
        None,
        "File with the sites that may take part: on each line the name of a certificate or the fingerprint of its key. "
        "Read again when it changes; a site that is no longer in it is out at its next call.",
        group="Sites",
    )
    revoked: Path | None = parameter(
        None,
        "Certificates that no longer count: a revocation list (CRL) in PEM that --tls-ca signed, as `fedhds certs "
        "revoke` writes it, or a file with a name, fingerprint of a key or serial number on each line. Read again when "
        "it changes.",
        group="Sites",
    )
    evaluators: Path | None = parameter(
        None,
        "File with the sites that may evaluate, in the form of --allow-sites, read when they register; without it any "
        "site with held-out rows may.",
        group="Sites",
    )
    tls_ca: Path | None = parameter(
        None, "CA certificate that must have issued the sites' certificates.", group="Server"
    )
    tls_cert: Path | None = parameter(None, "The coordinator's certificate.", group="Server")
    tls_key: Path | None = parameter(None, "Key of the coordinator's certificate.", group="Server")
    insecure: bool = parameter(
        False,
        "Listen beyond loopback without TLS: for gRPC, where anybody who reaches the port can join, and for --http, "
        "which has no TLS or passwords, so that anybody who reaches its port can read the sites' names, errors and "
        "results. With --tls-ca, --tls-cert and --tls-key gRPC uses TLS all the same.",
        group="Server",
    )
    http: str = parameter(
        "",
        "Serve the status page, which names sites, /metrics, /healthz and /readyz over HTTP at this HOST:PORT; port 0 "
        "takes a free one.",
        group="Server",
    )
    track: tuple[str, ...] = parameter(
        (),
        "Send the run's settings and the scalars of its rounds and evaluations there, too: tensorboard, mlflow, wandb, "
        "or several. Each needs the extra of its name, pip install 'fedhds[tensorboard]', and reads its own variables. "
        "metrics.jsonl in the run folder is always written.",
        group="Server",
    )
    log_level: LogLevel = parameter("INFO", "Lowest level to log.", group="Server")
    log_format: LogFormat = parameter(
        "plain", "Lines for people, with colors on a terminal, or JSON objects for machines.", group="Server"
    )

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        try:
            host, _ = host_and_port(self.listen)
        except ValueError as error:
            raise ValueError(f"listen: {error}") from None
        if not is_loopback(host) and not self.tls_cert and not self.insecure:
            raise ValueError(
                f"listen: {host} is reachable from other machines and there is no TLS; give --tls-ca, --tls-cert and "
                "--tls-key (see fedhds certs), or --insecure"
            )
        check_http(self.http, self.insecure)
        return self

    @model_validator(mode="after")
    def _check_secure(self) -> Self:
        if self.run.secure.enabled and self.keep_updates:
            raise ValueError(
                "keep_updates: with --secure-aggregation this coordinator has masked updates and their sum, and no "
                "single update to keep; drop one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_run_folder(self) -> Self:
        folder = str(self.run_folder.absolute())
        if not_utf_8(folder):
            raise ValueError(
                f"run_folder: the name of {escaped(folder)} is not UTF-8, which SQLite needs; choose another folder"
            )
        return self

    @field_validator("track", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        """Takes names divided by commas, too, as in the environment."""
        if not isinstance(names, list | tuple):
            return names
        return tuple(name for text in names for name in re.split(r"[,\s]+", str(text)) if name)

    @field_validator("track")
    @classmethod
    def _check_track(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from importlib.util import find_spec

        from fedhds_server.observers import TRACKERS

        for name in names:
            if name not in TRACKERS:
                raise ValueError(f"there is no tracker {name!r}; choose from {', '.join(TRACKERS)}")
            if find_spec(TRACKERS[name].package) is None:
                raise ValueError(f"{name} needs its package: pip install 'fedhds[{name}]'")
        return tuple(dict.fromkeys(names))

    @field_validator("expected_fingerprint")
    @classmethod
    def _check_fingerprint(cls, text: str) -> str:
        if text and not is_digest(text):
            raise ValueError("give 64 hexadecimal digits in lower case, as `fedhds fingerprint MODEL` prints them")
        return text

    @model_validator(mode="after")
    def _check_epsilon(self) -> Self:
        privacy = self.run.privacy.selection
        if self.selection_epsilon is not None and privacy.noised:
            raise ValueError("selection_epsilon: it sets the noise itself; drop --selection-noise-multiplier")
        if self.selection_epsilon is not None and not privacy.clip_norm:
            raise ValueError("selection_clip_norm: an epsilon needs a clipping norm; set it above 0")
        return self

    def check_start(self) -> None:
        """Raises SettingsError for a run under secure aggregation that could not have a single round."""
        secure, rounds = self.run.secure, self.run.rounds
        if secure.enabled and self.tls_cert is None:
            raise SettingsError(
                "--secure-aggregation",
                "sites check each other's certificates, and there is no TLS; give --tls-ca, --tls-cert and --tls-key "
                "(see fedhds certs)",
            )
        if secure.enabled and rounds.min_sites < secure.min_sites:
            raise SettingsError(
                "--min-sites",
                f"a run with --secure-aggregation cannot begin with {rounds.min_sites} sites, as its rounds need "
                f"--min-secure-sites {secure.min_sites}; set it to that at least",
            )

    def run_spec(self) -> RunSpec:
        """The part that every site gets, with the noise that `selection_epsilon` asks for."""
        selections = 1 if self.run.selection.schedule == "one-shot" else self.run.rounds.count
        releases = selections * self.run.selection.releases(self.run)
        if self.selection_epsilon is None or not releases:
            return self.run
        # Where noise hides single rows, the number of rows leaves noised, too, once a run.
        releases += self.run.selection.strategy.privacy_unit != "client"
        from fedhds.privacy.mechanisms import calibrate_noise

        delta = self.run.privacy.selection.delta
        noise = calibrate_noise(epsilon=self.selection_epsilon, delta=delta, releases=releases)
        return self.run.replace(selection_noise_multiplier=noise)
