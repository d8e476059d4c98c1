"""Filters at a site: its rows' scores in public bins, kept on disk, so that all later steps mean the same rows.

All that leaves is a histogram, of which one row changes one count. Without noise, rows of like scores are put together
first, so that no count says something of fewer rows than the site lets out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedhds.errors import PrivacyError, StorageError, TaskError
from fedhds.privacy.mechanisms import noised_counts, site_rng
from fedhds.runtime.files import replace_file
from fedhds.spec import BINS, FILTER_SPECS
from fedhds.v2.selection_pb2 import ScoreHistogram, ScoreRange
from fedhds_client.selection.base import IntraClientSelection, SelectionContext
from fedhds_client.selection.private_reporter import MIN_NOISE_MULTIPLIER, PrivateReporter
from fedhds_client.state_files import MAX_RUNS, file_key, keep_newest

if TYPE_CHECKING:
    from google.protobuf.message import Message

Ids = npt.NDArray[np.int64]
Scores = Callable[[Ids], npt.NDArray[np.floating]]
"""The score of each of these rows."""


@dataclass(frozen=True)
class ScoreFilter(IntraClientSelection):
    """One filter of the run, in one selection."""

    name: str
    round_number: int
    """Of the selection."""
    kept: Ids
    """Rows that the filters before have left."""
    scores: Scores

    def check_policy(self, reporter: PrivateReporter) -> None:
        check_noise(reporter)

    def release(self, context: SelectionContext) -> Message:
        reporter, privacy = context.reporter, context.spec.privacy.selection
        bins = FILTER_SPECS[self.name].bins(self.scores(self.kept))
        if not privacy.noised:
            bins = put_together(bins, least=reporter.min_cluster_rows)
        counts = np.bincount(bins, minlength=BINS)
        report = ScoreHistogram(filter=self.name)
        if privacy.noised:
            report.noise_std = privacy.noise_multiplier
            counts = noised_counts(counts, noise_multiplier=privacy.noise_multiplier, rng=site_rng())
        report.counts.extend(counts.tolist())
        reporter.check_budget()
        own = np.zeros(context.rows, dtype=np.uint8)
        own[self.kept] = bins
        replace_file(_file(reporter.folder, reporter.run_id, self.round_number, self.name), own.tobytes(), private=True)
        keep_newest(reporter.folder / "scores", MAX_RUNS)
        reporter.record(
            context.task_id,
            report,
            release=f"counts of rows by {self.name}",
            sensitivity=1.0 if privacy.noised else None,
            released=BINS,
            dimension=1,
        )
        return report


def kept_rows(ranges: Iterable[ScoreRange], *, rows: int, run_id: str, folder: Path, round_number: int) -> Ids:
    """Ids of the rows, ascending, whose scores are in all `ranges`; without ranges all of them.

    `folder` is the site's state folder. Raises TaskError for a filter whose scores this site never reported,
    StorageError when they cannot be read.
    """
    kept = np.ones(rows, dtype=bool)
    for each in ranges:
        if each.filter not in FILTER_SPECS:
            raise TaskError("the task has a filter that this version does not know")
        try:
            bins = np.frombuffer(_file(folder, run_id, round_number, each.filter).read_bytes(), dtype=np.uint8)
        except FileNotFoundError as error:
            raise TaskError(f"this site has reported no scores of the filter {each.filter} in this run") from error
        except OSError as error:
            raise StorageError(f"cannot read the scores below {folder}: {error.strerror}; check the folder") from error
        if len(bins) != rows:
            raise TaskError(f"the shard has {rows} rows, but had {len(bins)} when their scores were reported")
        kept &= (bins >= each.first) & (bins <= each.last)
    return np.flatnonzero(kept)


def check_noise(reporter: PrivateReporter) -> None:
    """Raises PrivacyError where counts would have noise that hides no row, and rows that are not put together."""
    if reporter.spec.privacy.selection.noised and not reporter.hides_rows and reporter.min_cluster_rows > 1:
        raise PrivacyError(
            "the run's noise hides no row in a count, and this site has not agreed to that: start it with "
            f"--min-cluster-rows 1, or the run with a noise multiplier of {MIN_NOISE_MULTIPLIER} at least"
        )


def put_together(bins: Sequence[int] | Ids, *, least: int) -> Ids:
    """The bins (n,) of rows after groups of `least` like ones, or more, took the bin of their middle one.

    A shard of fewer rows says nothing: all of them are in the first bin.
    """
    own = np.array(bins, dtype=np.int64)
    if len(own) < least:
        return np.zeros_like(own)
    order = np.argsort(own, kind="stable")
    groups = np.array_split(order, max(1, len(own) // least))
    for group in groups:
        own[group] = own[group[len(group) // 2]]
    return own


def _file(folder: Path, run_id: str, round_number: int, name: str) -> Path:
    return folder / "scores" / file_key(run_id) / f"{round_number}-{name}"
