"""What a run does now, in a word for people."""

from __future__ import annotations

from fedhds_server.run.state import Phase, RunState
from fedhds_server.workflows import WORKFLOWS

_VALIDATING = "validating"


def activity(state: RunState) -> str:
    """Where the run stands, for people: its phase, or what its open stage does."""
    if state.phase is not Phase.RUNNING:
        return state.phase.value
    if state.stage is None:
        return _VALIDATING
    workflow = WORKFLOWS[state.stage.kind]
    return workflow.resolving if state.stage.closed else workflow.collecting


def activities() -> list[str]:
    """Everything that `activity` can say."""
    running = [name for workflow in WORKFLOWS.values() for name in (workflow.collecting, workflow.resolving)]
    return [
        Phase.ENROLLING.value,
        *dict.fromkeys(running),
        _VALIDATING,
        *(phase.value for phase in Phase if phase.over or phase is Phase.FINISHING),
    ]
