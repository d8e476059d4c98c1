"""metrics.jsonl in the run folder: one JSON object per closed round, evaluation and validation, each once."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from fedhds_server.observers.base import ObserverContext, RunObserver
from fedhds_server.run.state import ClosedRound, Evaluation
from fedhds_server.status import means_of, medians_of

logger = logging.getLogger(__name__)


class MetricsFile(RunObserver):
    """Appends a line for each event; after a restart it adds those that are missing."""

    def __init__(self, context: ObserverContext) -> None:
        super().__init__(context)
        self._path = context.folder / "metrics.jsonl"
        self._run_id = ""
        self._keys: set[tuple[str, int, str]] = set()
        self._so_far: dict[tuple[str, int], dict[str, Evaluation]] = {}

    def started(self, run_id: str, rounds: Sequence[ClosedRound]) -> None:
        self._run_id = run_id
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        # What a crash cut short has no line feed; it is written again.
        whole, _, _ = text.rpartition("\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        if whole and lines[0].get("run_id") != run_id:
            lines, whole = [], ""
        self._keys = {(line["event"], line["round_number"], line.get("site", "")) for line in lines}
        self._path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        for closed in rounds:
            self.round_closed(closed)

    def round_closed(self, closed: ClosedRound) -> None:
        self._append(
            "round",
            closed.round_number,
            sites=len(closed.contributions),
            samples=closed.samples,
            loss=closed.loss,
            seconds=round(closed.seconds, 3),
            tokens_per_s=round(closed.tokens_per_s, 1),
            product_gap=closed.product_gap,
            updates={site: score.model_dump() for site, score in closed.updates.items()},
            unchanged=closed.unchanged,
        )

    def evaluated(self, round_number: int, site: str, evaluation: Evaluation) -> None:
        self._measured("evaluation", round_number, site, evaluation)

    def validated(self, round_number: int, site: str, validation: Evaluation) -> None:
        self._measured("validation", round_number, site, validation)

    def _measured(self, event: str, round_number: int, site: str, evaluation: Evaluation) -> None:
        so_far = self._so_far.setdefault((event, round_number), {})
        so_far[site] = evaluation
        self._append(
            event,
            round_number,
            site=site,
            rows=evaluation.rows,
            metrics=means_of({site: evaluation})[1],
            # Over all sites up to this line.
            mean=means_of(so_far)[1],
            median=medians_of(so_far)[1],
        )

    def _append(self, event: str, round_number: int, **facts: Any) -> None:
        key = (event, round_number, str(facts.get("site", "")))
        if key in self._keys:
            return
        self._keys.add(key)
        with self._path.open("a", encoding="utf-8") as file:
            line = {"event": event, "run_id": self._run_id, "round_number": round_number, **facts}
            file.write(json.dumps(line) + "\n")
