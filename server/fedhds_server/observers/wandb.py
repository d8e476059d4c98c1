"""Weights & Biases: to its service, or into the run folder with WANDB_MODE=offline."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from fedhds.runtime.files import replace_file
from fedhds_server.observers.tracker import Tracker
from fedhds_server.run.state import Phase


class WandB(Tracker):
    """One run of W&B for each run, by its id. What it has cannot be asked for offline, so a file remembers it."""

    package = "wandb"
    _run: Any = None

    def open(self, parameters: Mapping[str, str]) -> None:
        """Goes on with the run of this id, or makes it."""
        import wandb

        self._file = self.context.folder / f"wandb-{self.run_id}.json"
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.exists() else []
        self._known = {(name, number) for name, number in known}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedhds",
            id=self.run_id,
            name=self.run_id,
            resume="allow",
            dir=str(self.context.folder),
            config=dict(parameters),
            # Neither the console nor the machine is its concern.
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_code=True),
        )
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def write(self, round_number: int, scalars: Mapping[str, float]) -> None:
        """Rounds are an axis of their own, as W&B's own steps take no earlier round."""
        new = {name: value for name, value in scalars.items() if (name, round_number) not in self._known}
        if not new:
            return
        self._run.log({"round": round_number, **new})
        self._known |= {(name, round_number) for name in new}
        replace_file(self._file, json.dumps(sorted(self._known)))

    def finish(self, phase: Phase) -> None:
        """Ends W&B's run."""
        self._run.finish(exit_code=0 if phase is Phase.COMPLETED else 1)
        self._run = None

    def closed(self) -> None:
        """Writes what is left; the run of this id goes on with the next process."""
        if self._run is not None:
            self._run.finish(exit_code=0)
