"""What a run is made of: kinds of tasks, one file each, and workflows, which give their tasks out in stages.

A new workflow is a file with a `Workflow`, an entry here, an executor of the same kind at the site, and the step of
`run/rounds.py` that opens its first stage.
"""

from fedhds_server.workflows.base import TaskKind, Workflow
from fedhds_server.workflows.evaluation import EvaluationTasks, ValidationTasks
from fedhds_server.workflows.secure_training import SecureTrainingWorkflow
from fedhds_server.workflows.selection import SelectionWorkflow
from fedhds_server.workflows.training import TrainingWorkflow

WORKFLOWS: dict[str, Workflow] = {
    workflow.kind: workflow for workflow in (SelectionWorkflow(), TrainingWorkflow(), SecureTrainingWorkflow())
}
# In the order in which a site that has tasks of several kinds gets them: the next round waits for validation.
TASK_KINDS: dict[str, TaskKind] = {
    ValidationTasks.kind: ValidationTasks(),
    **WORKFLOWS,
    EvaluationTasks.kind: EvaluationTasks(),
}
