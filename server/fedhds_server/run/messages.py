"""What a site may read of where the run stands: its own part, and no other site's name or error."""

from __future__ import annotations

from fedhds_server.run.parties import parties
from fedhds_server.run.quorum import CohortProgress
from fedhds_server.run.state import Phase, RunState
from fedhds_server.workflows import WORKFLOWS

VALIDATING = "waiting for the validation of the last round"


def missing(state: RunState) -> str:
    """Whom a run that has not begun waits for; empty when all are here."""
    rounds = state.spec.rounds
    sites = rounds.min_sites - len(parties(state.trainers))
    evaluators = rounds.min_evaluators - len(parties(state.evaluators))
    parts = [f"{sites} more site{'s' * (sites > 1)}"] if sites > 0 else []
    parts += [f"{evaluators} more evaluator{'s' * (evaluators > 1)}"] if evaluators > 0 else []
    if state.spec.evaluation.needs_validation and not state.validators:
        parts.append("a site with rows to validate on (--validation-data or --holdout)")
    return " and ".join(parts)


def for_site(state: RunState, site: str = "") -> str:
    """One line for the people of `site`, or of any site; `RunState.message` is the operator's."""
    if state.phase.over:
        own = state.sites[site].last_error if site in state.sites else ""
        return state.end_message + f"; this site's last failure: {own}" * bool(own and state.phase is Phase.FAILED)
    if state.phase is Phase.ENROLLING:
        return f"waiting for {missing(state) or 'the initial adapter'}"
    stage, progress = state.stage, CohortProgress.of(state)
    if stage is None:
        return "waiting for the last evaluations" if state.phase is Phase.FINISHING else VALIDATING
    workflow = WORKFLOWS[stage.kind]
    return f"{workflow.title(state, stage)}: {progress.outline}" if progress else workflow.closing(state, stage)
