"""A worker process of a site works on the rows of its leader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedhds.spec import RunSpec
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.distributed import worker
from fedhds_client.distributed.process_group import Extract, Matrix, Prepare, Stop
from tests.support.templates import STRICT, talk
from tests.support.tiny import make_model


def test_a_worker_leaves_out_the_rows_that_the_template_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(make_model(tmp_path / "model"))
    tokenizer.chat_template = STRICT
    path = tmp_path / "rows.jsonl"
    roles = ("user assistant", "system user assistant", "user assistant user assistant")
    path.write_text("\n".join(talk(*turns.split()) for turns in roles))
    seen: list[str] = []

    class Features:
        def __init__(self, *_: object) -> None:
            pass

        def extract(self, shard: Shard, rows: Sequence[int], adapter: Path) -> Any:
            seen.extend(shard[row].response for row in rows)
            return SimpleNamespace(values=np.zeros((len(rows), 1), np.float32))

    class Group:
        commands = iter(
            (Prepare(RunSpec.of(model="m", rounds=1).model_dump_json().encode()), Extract(0, (0, 1), b""), Stop())
        )

        def receive(self) -> object:
            return next(self.commands)

        def contribute(self, rows: Sequence[int], extract: Callable[[Sequence[int]], Matrix]) -> None:
            extract(rows)

        def close(self) -> None:
            pass

    monkeypatch.setattr(worker, "load_models", lambda *_: (None, None, Prompter(tokenizer, max_length=256)))
    monkeypatch.setattr(worker, "ShardFeatures", Features)
    settings: Any = SimpleNamespace(data=(path,), skip_bad_rows=True, holdout=0.0)
    group: Any = Group()
    assert worker.run_worker(settings, group) == 0
    assert seen == ["assistant 1", "assistant 3"]
