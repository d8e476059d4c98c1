"""A small federation on real instruction data with a real model, when both are on this machine."""

from __future__ import annotations

import gzip
import itertools
import json
import math

import pytest

from tests.support import programs
from tests.support.federation import Federation
from tests.support.shared import shared

pytestmark = pytest.mark.e2e
# The file is sorted by category; every fiftieth row gives all of them.
STEP = 50


@pytest.mark.parametrize(
    "strategy", ["fedhds", *(pytest.param(name, marks=pytest.mark.long) for name in ("random", "full"))]
)
def test_sites_with_parts_of_dolly_tune_a_model_that_was_pretrained(federation: Federation, strategy: str) -> None:
    data = shared("data/dolly/databricks-dolly-15k.jsonl.gz")
    federation.model = shared("models/nano-llama")
    folder = federation.folder
    with gzip.open(data, "rt", encoding="utf-8") as file:
        (folder / "dolly.jsonl").write_text("".join(itertools.islice(file, 0, None, STEP)), encoding="utf-8")
    options = ["--sites=4", "--alpha=0.5", "--unseen=summarization", "--unseen-rows=16", f"--out={folder / 'shards'}"]
    programs.run("fedhds", "split", folder / "dolly.jsonl", *options).check_returncode()
    server = federation.server(
        "--rounds=2",
        f"--selection-strategy={strategy}",
        *([] if strategy == "full" else ["--selection-budget=3%"]),
        "--learning-rate=1e-3",
        "--min-sites=4",
        "--min-evaluators=1",
        "--evaluate-every=0",
    )
    shards = sorted((folder / "shards").glob("site-*.jsonl"))
    sites = federation.client("sites", "--data", *shards, "--name", *(shard.stem for shard in shards))
    evaluator = federation.client("evaluator", f"--eval-data={folder / 'shards' / 'unseen.jsonl'}")
    assert server.wait(400) == 0, server.text
    assert [sites.wait(), evaluator.wait()] == [0, 0], sites.text + evaluator.text
    report = json.loads((folder / "run" / "report.json").read_text())
    pool, trained = int(report["pool_rows"]), int(report["trained_rows"])
    assert pool > 200
    before, after = report["evaluations"]
    if strategy == "full":
        assert trained == pool
        # Two passes over hundreds of rows are felt on unseen tasks; two over a few rows need not be.
        assert after["metrics"]["loss"] < before["metrics"]["loss"]
    else:
        assert trained == math.ceil(0.03 * pool)
    assert before["metrics"]["loss"] != after["metrics"]["loss"]
