"""Under noise nothing exact leaves beside it: shards with and without a canary give the same messages, noise aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from fedhds.errors import DataError, PolicyError, PrivacyError
from fedhds.privacy.accountant import epsilon_of
from fedhds.privacy.ledger import Ledger
from fedhds.spec import RunSpec
from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from fedhds_client.computation import Control
from fedhds_client.distributed.process_group import ProcessGroup
from fedhds_client.executor import TaskExecutor
from fedhds_client.outgoing import public_reason
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from fedhds_client.stated_rows import rows_noise
from tests.support.tiny import make_model, write_rows

DP = {"selection_strategy": "full", "dp_noise_multiplier": 1.0}
KMEANS = {
    "selection_strategy": "federated-kmeans",
    "selection_clip_norm": 1.0,
    "selection_noise_multiplier": 2.0,
    "released_centroids": 3,
    "feature_dimension": 16,
}
CLUSTERS = {
    "selection_strategy": "fedhds-aligned",
    "reduction": "none",
    "selection_clip_norm": 1.0,
    "selection_noise_multiplier": 2.0,
    "released_centroids": 3,
    "feature_dimension": 16,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def spec_of(model: Path, **fields: Any) -> RunSpec:
    return RunSpec.of(**{"model": str(model), "rounds": 2, "max_length": 256, "lora_rank": 2, "batch_size": 4} | fields)


class AtSite:
    """A site of a run, and what it sends for tasks."""

    def __init__(self, site: Site, executor: TaskExecutor, folder: Path, run_id: str) -> None:
        self.site, self._executor, self._folder, self._run_id = site, executor, folder, run_id
        self.rows = executor.judge(site, run_id, Control())

    def send(self, kind: str, request: Any = None, *, round_number: int = 1, task_id: str = "") -> Any:
        adapter = self._folder / "adapter"
        models: Any = self._executor._models
        models.model.save(adapter)
        task = pb.Task(id=task_id or f"{kind}/{round_number}/ward", kind=kind, round_number=round_number)
        if request is not None:
            task.request.Pack(request)
        return self._executor.execute(self.site, self._run_id, task, adapter, Control()).message


@contextmanager
def site_of(
    folder: Path, model: Path, rows: Path, spec: RunSpec, *, run_id: str = "run", **flags: Any
) -> Iterator[AtSite]:
    folder.mkdir(exist_ok=True)
    settings = ClientSettings(
        data=(rows,), state=folder / "state", out=folder / "out", device="cpu",
        **{"ledger": folder / "ledger.db", "name": ("ward",)} | flags,
    )  # fmt: skip
    with ExitStack() as stack:
        sites = open_sites(settings, None, stack)
        executor = TaskExecutor(settings, sites, ProcessGroup.join("cpu"))
        executor.prepare(spec)
        yield AtSite(sites[0], executor, folder, run_id)


def shards(folder: Path) -> tuple[Path, Path]:
    """The same rows without and with a canary: a row so long that it is cut."""
    plain = write_rows(folder / "plain.jsonl", {"sun": 8, "sea": 8})
    canary = folder / "canary.jsonl"
    last = plain.read_text().splitlines()[-1].replace("sea", "sea" * 200)
    canary.write_text(plain.read_text() + last + "\n")
    return plain, canary


def told(message: Any, *noised: str) -> Any:
    """All fields of a message, those that are noised aside."""
    fields = MessageToDict(message, always_print_fields_with_no_presence=True)

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in noised}
        return [without(item) for item in value] if isinstance(value, list) else value

    return without(fields)


def whole() -> pb.TrainRequest:
    return pb.TrainRequest(coreset=selection_pb2.Coreset(all=selection_pb2.AllRows()))


@pytest.mark.slow
def test_dp_sgd_tells_nothing_of_the_rows_but_the_noised_adapter(model: Path, tmp_path: Path) -> None:
    sent, rows = [], []
    for number, shard in enumerate(shards(tmp_path)):
        with site_of(tmp_path / str(number), model, shard, spec_of(model, **DP)) as at:
            result = at.send("train", whole())
            # The digest is that of the noised tensors; the number of rows is noised, too, and asked for as it was told.
            assert result.samples == at.rows
            sent.append(told(result, "digest", "samples"))
            rows.append(at.rows)
            assert {(e.release, e.unit, e.noise_multiplier > 0) for e in at.site.account.entries()} == {
                ("number of rows", "example", True),
                ("adapter", "example", True),
            }
            # What it says of errors does not depend on rows either.
            assert public_reason(DataError(shard, "is too long", 17), noised=True) == "the site's log has the details"
    assert sent[0] == sent[1]
    assert sent[0]["trainS"] == 0
    assert "loss" not in sent[0]
    assert rows != [16, 17]


def test_the_number_of_rows_is_noised_once_a_run(model: Path, tmp_path: Path) -> None:
    spec = spec_of(model, **DP)
    noise = rows_noise(spec)
    assert noise == 10.0
    shard = shards(tmp_path)[0]
    with site_of(tmp_path, model, shard, spec) as at:
        first = at.rows
    with site_of(tmp_path, model, shard, spec) as at:
        assert at.rows == first
        spent = at.site.account.spent(delta=1e-5, unit="example")
    with site_of(tmp_path, model, shard, spec, run_id="other") as at:
        assert at.site.account.spent(delta=1e-5, unit="example") > spent
    # With an epsilon, a tenth of it.
    assert rows_noise(spec_of(model, selection_strategy="full", epsilon=1.0)) > 20
    assert rows_noise(spec_of(model, **KMEANS)) == 2.0


def test_noised_sums_tell_nothing_exact_and_picks_are_counted_as_asked(model: Path, tmp_path: Path) -> None:
    reports, results = [], []
    for number, shard in enumerate(shards(tmp_path)):
        with site_of(tmp_path / str(number), model, shard, spec_of(model, **KMEANS)) as at:
            centers = selection_pb2.KMeansCenters(
                dimension=16, values=[0.0] * 15 + [1.0] + [1.0] + [0.0] * 15, last=True
            )
            reports.append(told(at.send("select", centers), "count", "sums"))
            picks = selection_pb2.ClusterPicks(
                select_task_id="select/1/ward",
                clusters=[
                    selection_pb2.ClusterPick(cluster_id=0, count=1),
                    selection_pb2.ClusterPick(cluster_id=1, count=500),
                ],
            )
            result = at.send("train", pb.TrainRequest(coreset=selection_pb2.Coreset(picks=picks)))
            # The site has far fewer rows there.
            assert result.samples == min(at.rows, 501)
            results.append(told(result, "digest", "samples"))
    assert reports[0] == reports[1]
    assert results[0] == results[1]


def test_noise_on_the_whole_shard_hides_its_size_and_clusters(model: Path, tmp_path: Path) -> None:
    reports = []
    small, large = (
        write_rows(tmp_path / f"{name}.jsonl", topics)
        for name, topics in (("s", {"sun": 6}), ("l", {"sun": 20, "sea": 20}))
    )
    for number, shard in enumerate((small, large)):
        with site_of(tmp_path / str(number), model, shard, spec_of(model, **CLUSTERS)) as at:
            assert at.rows == 1000
            reports.append(told(at.send("select"), "values"))
    assert reports[0] == reports[1]


def test_without_noise_everything_is_as_it_was(model: Path, tmp_path: Path) -> None:
    with site_of(tmp_path, model, shards(tmp_path)[1], spec_of(model, selection_strategy="full")) as at:
        result = at.send("train", whole())
    assert (at.rows, result.samples, result.truncated_rows) == (17, 17, 1)
    assert result.HasField("loss")
    assert result.train_s > 0
    (entry,) = Ledger(tmp_path / "ledger.db").entries()
    assert (entry.release, entry.epsilon, entry.rows) == ("adapter", None, 17)


@pytest.mark.slow
def test_a_finished_update_costs_once_and_a_lost_one_again(model: Path, tmp_path: Path) -> None:
    spec = spec_of(model, **DP)
    with site_of(tmp_path, model, shards(tmp_path)[0], spec) as at:
        first = at.send("train", whole())
        assert at.send("train", whole()).update.digest == first.update.digest
        adapters = [entry for entry in at.site.account.entries() if entry.release == "adapter"]
        assert len(adapters) == 1
        for file in (tmp_path / "state").rglob("update-*"):
            file.unlink()
        assert at.send("train", whole()).update.digest != first.update.digest
        assert len([entry for entry in at.site.account.entries() if entry.release == "adapter"]) == 2


def test_a_kill_before_the_update_is_finished_has_counted_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with site_of(tmp_path, model, shards(tmp_path)[0], spec_of(model, **DP)) as at:
        with monkeypatch.context() as patched:
            patched.setattr("fedhds_client.updates.update.replace_file", killed)
            with pytest.raises(KeyboardInterrupt):
                at.send("train", whole())
        assert [entry.release for entry in at.site.account.entries()] == ["number of rows", "adapter"]


def test_a_run_keeps_to_its_own_epsilon_whatever_is_asked(model: Path, tmp_path: Path) -> None:
    """A round is asked for again and again: what is left of epsilon buys ever noisier adapters, and no more of it."""
    spec = spec_of(model, selection_strategy="full", epsilon=3.0, delta=1e-5, rounds=1, batch_size=1000)
    with site_of(tmp_path, model, shards(tmp_path)[0], spec) as at:
        for number in range(3):
            try:
                at.send("train", whole(), task_id=f"train/1/{number}")
            except PrivacyError as error:
                assert "--epsilon" in error.public_message  # noqa: PT017 - it may also fit
        noises = [entry.noise_multiplier for entry in at.site.account.entries() if entry.release == "adapter"]
        assert noises == sorted(noises)
        assert len(noises) == 1 or noises[1] > 5 * noises[0]
        assert 2.9 < epsilon_of(at.site.account.costs("run", unit="example"), delta=1e-5) <= 3.0


def test_the_policy_stops_tasks_and_metrics_without_telling_what_was_spent(model: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("max-epsilon: 1.2\nmax-rounds: 2\n")
    spec = spec_of(model, **DP)
    with site_of(tmp_path, model, shards(tmp_path)[0], spec, policy=policy) as at:
        with pytest.raises(PrivacyError) as caught:
            at.send("train", whole())
        assert public_reason(caught.value, noised=True) == "this release would go beyond the site's own max-epsilon"
        with pytest.raises(PolicyError, match="max-rounds: this is round 3"):
            at.send("train", whole(), round_number=3)
    policy.write_text("max-epsilon: 1.2\n")
    with (
        pytest.raises(PolicyError, match="max-epsilon: the run trains without noise"),
        site_of(tmp_path, model, shards(tmp_path)[0], spec_of(model, selection_strategy="full"), policy=policy),
    ):
        pass


def test_the_same_rows_under_other_names_files_and_folders_have_one_budget(model: Path, tmp_path: Path) -> None:
    spec = spec_of(model, **KMEANS | {"selection_noise_multiplier": 5.0})
    lines = shards(tmp_path)[0].read_text().splitlines()
    refused = []
    for number in range(5):
        shard = tmp_path / f"shard-{number}.jsonl"
        shard.write_text("\n".join(lines[number:] + lines[:number]) + "\n")
        flags: dict[str, Any] = {"name": (f"site-{number}",), "ledger": tmp_path / "ledger.db"}
        try:
            with site_of(
                tmp_path / str(number), model, shard, spec, run_id=str(number), selection_max_epsilon=1.2, **flags
            ) as at:
                at.send("select", task_id=f"select/0/site-{number}")
        except PrivacyError:
            refused.append(number)
    assert refused == [1, 2, 3, 4]
