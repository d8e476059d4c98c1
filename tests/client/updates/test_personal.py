"""Personal adapters: tuned on from the global one, compared on rows that did not train, and made after a restart."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedhds.errors import TaskError
from fedhds.spec import RunSpec
from fedhds_client.computation import Control
from fedhds_client.daemon import run_sites
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation.evaluate import evaluate
from fedhds_client.executor import TaskExecutor
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import load_base_model
from fedhds_client.settings import ClientSettings
from fedhds_client.site import Site, open_sites
from fedhds_client.updates.personal import PersonalJob
from tests.support.tiny import make_model, write_rows

TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


class Group:
    """One process alone."""

    def broadcast(self, command: object) -> None:
        pass

    def close(self) -> None:
        pass


class Place:
    """A site that has just got the global adapter."""

    def __init__(self, folder: Path, model: Path, stack: ExitStack, **settings: Any) -> None:
        self.rows = write_rows(folder / "rows.jsonl", {"cats": 24})
        self.settings = ClientSettings(
            data=(self.rows,),
            holdout=0.25,
            personalize=True,
            personal_epochs=2,
            out=folder / "out",
            state=folder / "state",
            name=("ward",),
            server="127.0.0.1:9",
            reconnect_timeout=1.0,
            device="cpu",
            **settings,
        )
        spec = RunSpec.of(
            model=str(model), rounds=1, lora_rank=4, learning_rate=1e-2, max_new_tokens=4, prompt_format="alpaca"
        )
        (self.site,) = open_sites(self.settings, None, stack)
        group: Any = Group()
        self.executor = TaskExecutor(self.settings, [self.site], group)
        self.executor.prepare(spec)
        assert self.executor._models
        sent = self.site.folder / "adapters" / "raw"
        sent.parent.mkdir()
        artifact = self.executor._models.model.save(sent)
        self.sent = sent.rename(sent.with_name(artifact.digest))
        self.executor.deliver(self.site, "run-1", self.sent, "---\nlibrary_name: peft\n---\n# Adapter\n")
        self.delivered = _files(self.out)

    @property
    def out(self) -> Path:
        return self.settings.out

    def personalize(self) -> None:
        job = PersonalJob.pending(self.site.folder)
        assert job
        self.executor.personalize(self.site, job, Control())


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_it_is_better_on_rows_like_the_sites_own_and_says_so(tmp_path: Path, llama: Path) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path, llama, stack)
        place.personalize()
        assert _files(place.out) == place.delivered
        own = place.out / "personal"
        assert set(_files(own)) == {*place.delivered, "report.json"}
        report = json.loads((own / "report.json").read_text())
        assert (report["run_id"], report["rows"], report["compared_on"]) == ("run-1", 18, 6)
        metrics = report["metrics"]
        # The global adapter is untrained here.
        assert metrics["base"] == pytest.approx(metrics["global"])
        assert metrics["personal"]["loss"] < metrics["global"]["loss"]
        card = (own / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: peft\n---\n")
        assert f"| {metrics['personal']['loss']:.4f} |" in card
        # What is in the folder is what was measured.
        base = load_base_model(str(llama), device="cpu")
        assert place.executor._models
        assert place.site.validation
        again = evaluate(
            InferenceModel.with_adapter(base, own),
            place.site.validation,
            place.executor._models.prompter,
            max_new_tokens=4,
            batch_size=4,
        )
        assert again.means == pytest.approx(metrics["personal"], rel=1e-4)


@pytest.mark.parametrize("shared_a", [True, False])
def test_a_stays_the_federations_on_request(tmp_path: Path, llama: Path, shared_a: bool) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path, llama, stack, personal_shared_a=shared_a)
        place.personalize()
        before, after = load_file(place.out / TENSORS), load_file(place.out / "personal" / TENSORS)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        factors = [name for name in before if shared_a <= ("lora_B" in name)]
        assert changed == set(factors)


def test_rows_that_compare_do_not_tune(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[str] = []
    with ExitStack() as stack:
        place = Place(tmp_path, llama, stack)
        held = {row.digest for row in place.site.validation or ()}
        reading = Shard.__getitem__

        def noted(self: Shard, number: int) -> Any:
            row = reading(self, number)
            if self is place.site.shard:
                tuned.append(row.digest)
            return row

        monkeypatch.setattr(Shard, "__getitem__", noted)
        place.personalize()
    assert len(set(tuned)) == 18
    assert not held & set(tuned)


def _as_after_a_crash(place: Place, stack: ExitStack) -> Site:
    site = place.site
    stack.close()
    assert PersonalJob.pending(site.folder)
    return site


async def test_a_restart_makes_it_without_the_coordinator(tmp_path: Path, llama: Path) -> None:
    stack = ExitStack()
    place = Place(tmp_path, llama, stack)
    site = _as_after_a_crash(place, stack)
    assert await run_sites(place.settings) == 0
    assert (place.out / "personal" / TENSORS).exists()
    assert PersonalJob.pending(site.folder) is None
    assert _files(place.out) == place.delivered


async def test_a_failure_leaves_the_global_adapter_and_is_said(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stack = ExitStack()
    place = Place(tmp_path, llama, stack)
    site = _as_after_a_crash(place, stack)
    place.sent.unlink()
    assert await run_sites(place.settings) == 1
    assert "there is no personal adapter (TaskError)" in caplog.text
    assert _files(place.out) == place.delivered
    assert not (place.out / "personal").exists()
    # It would fail again.
    assert PersonalJob.pending(site.folder) is None


def test_other_factors_than_loras_are_refused(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        place = Place(tmp_path, llama, stack, personal_shared_a=True)
        assert place.executor._models
        manifest = place.executor._models.model.manifest()
        monkeypatch.setattr(type(manifest), "roles", frozenset({"prompt"}))
        with pytest.raises(TaskError, match="--personal-shared-a needs an adapter of LoRA's factors"):
            place.personalize()


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"data": ("a.jsonl",)}, "rows to compare on; give --holdout"),
        ({"eval_data": "a.jsonl", "validation_data": "v.jsonl"}, "needs --data"),
        ({"data": ("a.jsonl", "b.jsonl"), "validation_data": "v.jsonl"}, "several shards each needs rows of its own"),
    ],
)
def test_it_needs_rows_to_tune_on_and_to_compare_on(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ClientSettings(personalize=True, **settings)
