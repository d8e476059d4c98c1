"""Who takes part in a round, and in which kind of training task."""

from __future__ import annotations

import math

from fedhds_server.run.quorum import draw
from fedhds_server.run.state import RunState
from fedhds_server.workflows.secure_training import SecureTrainingWorkflow
from fedhds_server.workflows.training import TrainingWorkflow


def eligible_sites(state: RunState) -> list[str]:
    """Sites that a round may draw: with one-shot selection those that it gave rows."""
    anyone = not state.spec.selection.one_shot
    return [site for site in state.trainers if anyone or site in state.coresets]


def drawn(state: RunState, sites: list[str]) -> list[str]:
    """The round's cohort out of `sites`, over-selection included; never fewer than the quorum."""
    rounds = state.spec.rounds
    size = max(math.ceil(state.round_size * (1 + rounds.over_selection)), rounds.quorum_of(state.round_size))
    if state.spec.secure.enabled:
        size = max(size, state.spec.secure.min_sites)
    return draw(sites, size, seed=state.spec.seed, round_number=state.round_number)


def training_kind(state: RunState) -> str:
    """The kind of the run's training tasks."""
    return (SecureTrainingWorkflow if state.spec.secure.enabled else TrainingWorkflow).kind
