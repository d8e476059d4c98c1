"""What a simulation is made of: the data and how it is dealt out, and the settings of the coordinator."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from fedhds.settings import Parameters, Setting, parameter, settings_of
from fedhds_server.settings import ServerSettings

# The simulation sets these itself.
_OWN = frozenset(
    [
        *("listen", "run_folder", "artifacts", "store", "tls_ca", "tls_cert", "tls_key", "insecure", "http"),
        *("log_level", "log_format", "min_sites", "min_evaluators"),
    ]
)
_ROUNDS = 10


class SimulationSettings(Parameters):
    """Settings of `fedhds simulate`."""

    data: tuple[Path, ...] = parameter(
        (), "Data files (or folders of them) that are dealt out to the sites.", group="Simulation"
    )
    shards: Path | None = parameter(
        None,
        "Folder of ready shards, one file per site, in place of --data; rows in its unseen.jsonl are for evaluation "
        "alone. `fedhds split` makes one.",
        group="Simulation",
    )
    sites: int = parameter(20, "Number of sites that --data is dealt out to.", group="Simulation", ge=1, le=1000)
    by: Literal["dirichlet", "category", "iid", "task"] = parameter(
        "dirichlet", "How rows of --data are dealt out.", group="Simulation"
    )
    alpha: float = parameter(0.5, "Dirichlet concentration; smaller is less alike.", group="Simulation", gt=0)
    unseen: tuple[str, ...] = parameter(
        (), "Categories of --data that no site gets and the adapter is evaluated on.", group="Simulation"
    )
    unseen_rows: int | None = parameter(
        None, "Keep this many of the unseen rows, drawn by the seed.", group="Simulation", ge=1
    )
    eval_data: tuple[Path, ...] = parameter(
        (), "More rows to evaluate on: one evaluator per file, named after it.", group="Simulation"
    )
    target_data: Path | None = parameter(
        None,
        "Rows of a wanted task, which the first site has besides its own, for the strategies target-features and "
        "target-gradients.",
        group="Simulation",
    )
    processes: int = parameter(
        max(1, (os.cpu_count() or 1) - 1),
        "Client processes that the sites share; each of them loads the model.",
        group="Simulation",
        ge=1,
    )
    tls: bool = parameter(
        False,
        "Mutual TLS with an authority of the simulation's own. Every site then has a process and a certificate.",
        group="Simulation",
    )
    out: Path = parameter(
        Path("fedhds-simulation"),
        "Folder for shards, run folders, runs.jsonl and results; runs that are in its runs.jsonl are not run again.",
        group="Simulation",
    )
    coordinator: ServerSettings = Field()

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if bool(self.data) == bool(self.shards):
            raise ValueError("data: give either --data, or --shards with ready shards")
        if self.shards and (self.unseen or self.unseen_rows):
            raise ValueError("unseen: ready shards are not split; put the rows into unseen.jsonl of --shards")
        if self.coordinator.run.secure.enabled and not self.tls:
            raise ValueError("secure_aggregation: sites check each other's certificates; add --tls")
        names = ["unseen", *(path.name.split(".")[0] for path in self.eval_data)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ValueError(f"eval_data: two evaluators would be called {twice}; rename a file")
        return self


def simulation_settings() -> list[Setting]:
    """All settings that a person gives: the simulation's own and those of the coordinator that it does not set."""
    settings = [setting for setting in settings_of(SimulationSettings) if setting.name not in _OWN]
    return [_with_default(setting) if setting.name == "rounds" else setting for setting in settings]


def defaults() -> dict[str, str]:
    """What counts where nothing is given, unlike at the coordinator."""
    return {"rounds": str(_ROUNDS)}


def _with_default(setting: Setting) -> Setting:
    field = setting.field
    return replace(
        setting,
        field=FieldInfo(annotation=field.annotation, default=_ROUNDS, description=field.description),
    )
