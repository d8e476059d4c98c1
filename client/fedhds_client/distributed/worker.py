"""What a worker process of a site does: load the run's models and extract features of its share of the rows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fedhds.errors import StorageError
from fedhds.spec import RunSpec
from fedhds_client.data.shard import Shard
from fedhds_client.distributed.process_group import Extract, Matrix, Prepare, ProcessGroup, Stop
from fedhds_client.features.shard_features import ShardFeatures
from fedhds_client.run_models import load_models
from fedhds_client.settings import ClientSettings


def run_worker(settings: ClientSettings, group: ProcessGroup) -> int:
    """Executes the leader's commands until it says stop; returns the exit status."""
    features: ShardFeatures | None = None
    with ExitStack() as stack:
        # The state folder belongs to the leader. What this process writes is gone when it ends.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedhds-")))
        shards = [
            stack.enter_context(Shard.open(path, skip_bad_rows=settings.skip_bad_rows, spool_dir=folder))
            for path in settings.data
        ]
        if settings.holdout:
            for shard in shards:
                # The same rows as at the leader, which validates on them.
                stack.enter_context(shard.hold_out(settings.holdout, settings.holdout_seed, folder))
        while True:
            match group.receive():
                case Prepare(spec=content):
                    spec = RunSpec.model_validate_json(content)
                    _, model, prompter = load_models(settings, spec)
                    features = ShardFeatures(settings, spec, model, prompter, group)
                    for shard in shards:
                        # The same rows as at the leader, which ends the group where it may not leave any out.
                        shard.leave_out(prompter.check)
                case Extract() as command if features:
                    group.contribute(command.rows, partial(_extract, command, features, shards[command.shard], folder))
                case Stop():
                    group.close()
                    return 0
                case other:
                    raise RuntimeError(f"the leader sent {type(other).__name__} before Prepare")


def _extract(command: Extract, features: ShardFeatures, shard: Shard, folder: Path, rows: Sequence[int]) -> Matrix:
    adapter = folder / "adapter"
    try:
        adapter.write_bytes(command.adapter)
    except OSError as error:
        raise StorageError(f"cannot write the adapter to {folder}: {error.strerror}; free some space") from error
    return features.extract(shard, rows, adapter).values
