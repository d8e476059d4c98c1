"""What a process of a team does that does not lead: load the run's model, take features of its share of rows."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

from fedhds.runspec import RunSpec
from fedhds.v1 import runspec_pb2
from fedhds_client.settings import ClientSettings
from fedhds_client.shard import Shard
from fedhds_client.shard_features import ShardFeatures
from fedhds_client.team import Extract, Prepare, Stop, Team
from fedhds_client.workbench import load_models


def assist(chosen: ClientSettings, team: Team) -> int:
    """Follows the leader's orders to the end; the exit status."""
    features: ShardFeatures | None = None
    with ExitStack() as stack:
        # The leader holds the state folder; what this process spools is gone with it.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedhds-")))
        shards = [
            stack.enter_context(Shard.open(path, skip_bad_rows=chosen.skip_bad_rows, spool_dir=folder))
            for path in chosen.data
        ]
        while True:
            match team.order():
                case Prepare(spec=content):
                    spec = RunSpec.from_proto(runspec_pb2.RunSpec.FromString(content))
                    _, model, prompter = load_models(chosen, spec)
                    features = ShardFeatures(chosen, spec, model, prompter, team)
                case Extract(shard=number, rows=rows, adapter=content) if features:
                    adapter = folder / "adapter"
                    adapter.write_bytes(content)
                    team.gathered(features.part(shards[number], rows, adapter, lambda share: None))
                case Stop():
                    team.dissolved()
                    return 0
                case other:
                    raise AssertionError(f"the leader's order came out of turn: {other}")
