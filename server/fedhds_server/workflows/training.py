"""Training: the cohort trains on its coresets, and the updates become the next global adapter."""

from __future__ import annotations

import functools

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from fedhds.errors import RequestError
from fedhds.tensors.artifact import Artifact
from fedhds.tensors.codecs import CODECS
from fedhds.tensors.manifest import AdapterManifest
from fedhds.v2 import federation_pb2 as pb
from fedhds_server.aggregation import AGGREGATORS
from fedhds_server.run.events import Instruction, Outcome, Record, ResultReceived
from fedhds_server.run.state import Reply, RunState, Stage, Task, packed, unpacked
from fedhds_server.workflows.base import Workflow, Workspace

# Nats per response token that no model gives; what is summed over sites and rounds stays finite below it.
MAX_LOSS = 1e9
# A site's speed that no hardware has.
MAX_TOKENS_PER_S = 1e12
# Whose norms say what is usual: long enough for a median, short enough to follow what training does.
_RECENT_ROUNDS = 5


class TrainingWorkflow(Workflow):
    """Coresets and the global adapter out, updates in."""

    kind = "train"
    collecting = "training"
    resolving = "aggregating"
    answers = "updates"
    closes_at_target = True

    def title(self, state: RunState, stage: Stage) -> str:
        return f"round {stage.round_number} of {state.spec.rounds.count}"

    def closing(self, state: RunState, stage: Stage) -> str:
        return f"round {stage.round_number}: combining {len(contributions(stage))} updates"

    def resolver(self, state: RunState) -> str:
        spec = state.spec.aggregation
        return f"the aggregator {spec.aggregator.name} with the server optimizer {spec.optimizer.name}"

    def request(self, state: RunState, task: Task) -> pb.TrainRequest:
        roles = trainable_roles(state, task.round_number)
        return pb.TrainRequest(
            coreset=state.coreset_of(task.site),
            trainable_roles=sorted(roles) if roles != state.adapter_manifest.roles else (),
        )

    def upload_sizes(self, state: RunState, task: Task) -> range:
        roles = trainable_roles(state, task.round_number)
        return _update_sizes(state.manifest, roles, state.spec.aggregation.wire_dtype)

    def upload_of(self, result: Any) -> Artifact | None:
        trained = read(result)
        return Artifact.from_proto(trained.update) if trained.HasField("update") else None

    def check(self, state: RunState, task: Task, result: Any) -> tuple[str, str] | None:
        trained = read(result)
        if not trained.HasField("update") and not trained.samples:
            return None
        limit = row_limit(state, task.site)
        if not 0 < trained.samples <= limit:
            claim = f"the update claims {trained.samples} samples, the site was asked to train on at most {limit} rows"
            return "samples", claim
        if trained.HasField("loss") and not abs(trained.loss) <= MAX_LOSS:
            return "loss", f"the training loss is {trained.loss:g}, which no model gives"
        largest = trained.samples * state.spec.model.max_length
        if trained.response_tokens > largest:
            return "tokens", f"the update claims {trained.response_tokens} tokens; its rows hold {largest} at most"
        if trained.HasField("tokens_per_s") and not 0 <= trained.tokens_per_s <= MAX_TOKENS_PER_S:
            return "tokens", f"the update claims {trained.tokens_per_s:g} tokens a second"
        if not trained.HasField("update"):
            return "adapter", "the result names no update"
        return None

    def accept(self, state: RunState, task: Task, event: ResultReceived) -> list[Instruction]:
        stage = state.stage
        if stage is None:
            return []
        trained = read(event.result)
        empty = event.artifact is None
        # Nothing else that a site may have put into its message is kept.
        kept = pb.TrainResult(
            samples=trained.samples,
            loss=trained.loss if trained.HasField("loss") else None,
            response_tokens=trained.response_tokens if trained.HasField("response_tokens") else None,
            tokens_per_s=trained.tokens_per_s if trained.HasField("tokens_per_s") else None,
        )
        stage.replies[task.site] = Reply(task_id=task.id, message=packed(kept), artifact=event.artifact, empty=empty)
        if not empty:
            return []
        return [Record(f"site {task.site} has nothing to train on in round {task.round_number}: no row was picked")]

    def replaceable(self, state: RunState, stage: Stage) -> bool:
        # With a selection per round, other sites have no coreset yet.
        return state.spec.selection.one_shot

    def resolve(self, state: RunState, stage: Stage, workspace: Workspace) -> Outcome:
        return workspace.aggregate(state, stage)


def trainable_roles(state: RunState, round_number: int) -> frozenset[str]:
    """Roles of the tensors that train in a round, which alone its updates have."""
    rule = state.spec.aggregation.aggregator
    return AGGREGATORS[rule.name].trainable(rule, round_number, state.adapter_manifest.roles)


def recent_norms(state: RunState, round_number: int) -> list[dict[str, float]]:
    """Norms of the updates by site, of the last rounds in which the same tensors trained."""
    roles = trainable_roles(state, round_number)
    norms = [
        {site: update.norm for site, update in closed.updates.items()}
        for closed in state.closed_rounds
        if closed.updates and trainable_roles(state, closed.round_number) == roles
    ]
    return norms[-_RECENT_ROUNDS:]


@functools.lru_cache(maxsize=2)
def _update_sizes(manifest: str, roles: frozenset[str], wire_dtype: str) -> range:
    # Asked for with every open task, after every save.
    whole = AdapterManifest.from_proto(unpacked(manifest, pb.AdapterManifest))
    return CODECS[wire_dtype].sizes(whole.only(roles))


def contributions(stage: Stage) -> dict[str, pb.TrainResult]:
    """What the sites with an update said of it, by site in the order of names."""
    return {
        site: unpacked(reply.message, pb.TrainResult)
        for site, reply in sorted(stage.replies.items())
        if not reply.empty
    }


def row_limit(state: RunState, site: str) -> int:
    """Rows that `site` may train on at most by the last selection."""
    coreset, rows = state.coreset_of(site), state.sites[site].rows
    match coreset.WhichOneof("rows"):
        case "random":
            return min(rows, coreset.random.count)
        case "picks":
            return min(rows, sum(pick.count for pick in coreset.picks.clusters) + coreset.picks.unclustered)
    return rows


def read(result: Any) -> pb.TrainResult:
    """The result of a training task; raises RequestError for another message."""
    trained = pb.TrainResult()
    try:
        if result.Unpack(trained):
            return trained
    except DecodeError as error:
        raise RequestError("the training result's bytes are no message of its type") from error
    raise RequestError(f"a train task is completed by a fedhds.v2.TrainResult, not by a {result.TypeName()[:100]!r}")
