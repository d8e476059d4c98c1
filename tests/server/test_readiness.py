"""What makes a coordinator ready, and what its metrics say of states, without processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds_server.coordinator import Coordinator
from fedhds_server.counters import FAILED, count_failure
from fedhds_server.leadership.gate import PROBLEMS
from fedhds_server.leadership.readiness import DISK_RESERVE, Readiness, disk_needed
from fedhds_server.metrics import MEASURES, run_families
from fedhds_server.run.state import ClosedRound, Evaluation, Phase, RunState, Site, SiteState, TaskKind, Update
from fedhds_server.selection import STRATEGIES
from fedhds_server.storage.artifacts import ArtifactStore
from tests.server.stores import Place

ADAPTER = Artifact("0" * 64, 1000)


def of_sites(count: int, rounds: int = 3) -> RunState:
    """A training run in mid-round."""
    names = [f"site-{number}" for number in range(count)]
    return RunState(
        run_id="r",
        spec=RunSpec.of(model="m", rounds=9),
        phase=Phase.TRAINING,
        round=rounds + 1,
        sites={name: Site(name=name, state=SiteState.ENROLLED, rows=5, bytes_received=7) for name in names},
        cohort=names,
        target=count,
        adapters={rounds: ADAPTER},
        updates={names[0]: Update(artifact=ADAPTER, samples=1, loss=1.0)},
        closed_rounds=[
            ClosedRound(round=number, cohort=names, contributions=dict.fromkeys(names, 1), loss=0.5, seconds=2.0)
            for number in range(1, rounds + 1)
        ],
        evaluations={rounds: {names[0]: Evaluation(rows=4, tokens=8, loss_sum=16.0, rouge_l_sum=2.0)}},
    )


def leading(state: RunState, place: Place, folder: Path) -> Readiness:
    store = place.leading()
    term = LeaderGate()
    term._coordinator = Coordinator(
        state,
        store=store,
        artifacts=ArtifactStore(folder / "artifacts", largest_upload=1 << 20),
        folder=folder,
        strategy=STRATEGIES["full"],
        aggregator=None,  # type: ignore[arg-type]
    )
    return Readiness(store, folder, term)


def samples(readiness: Readiness) -> dict[tuple[str, tuple[str, ...]], float]:
    found = [sample for family in run_families(readiness) for sample in family.samples]
    return {(sample.name, tuple(sample.labels.values())): sample.value for sample in found}


def test_the_disk_must_hold_what_the_open_round_still_writes() -> None:
    assert disk_needed(None) == DISK_RESERVE
    assert disk_needed(RunState(run_id="r", spec=RunSpec.of(model="m", rounds=1))) == DISK_RESERVE
    state = of_sites(4)
    # Three updates to come, the next adapter and its copy.
    assert disk_needed(state) - DISK_RESERVE == 5 * ADAPTER.size
    state.phase = Phase.COMPLETED
    assert disk_needed(state) - DISK_RESERVE == 2 * ADAPTER.size


def test_a_state_is_told_in_numbers(sqlite: Place, tmp_path: Path) -> None:
    told = samples(leading(of_sites(4), sqlite, tmp_path))
    assert told["fedhds_updates_accepted_total", ()] == 13
    assert told["fedhds_round_seconds_total", ()] == 6
    assert told["fedhds_received_bytes_total", ()] == 28
    assert (told["fedhds_evaluation_loss", ()], told["fedhds_evaluation_rouge_l", ()]) == (2, 0.5)
    assert told["fedhds_collection_sites", ("answered",)] == 1
    assert told["fedhds_sites", ("enrolled",)] == 4


def test_series_do_not_grow_with_sites_or_rounds(sqlite: Place, tmp_path: Path) -> None:
    few = samples(leading(of_sites(2), sqlite, tmp_path))
    many = samples(leading(of_sites(2000, rounds=50), sqlite, tmp_path))
    assert few.keys() == many.keys()


def test_a_scrape_of_ten_thousand_sites_holds_the_loop_up_for_a_moment_only(sqlite: Place, tmp_path: Path) -> None:
    readiness = leading(of_sites(10_000, rounds=3), sqlite, tmp_path)
    began = time.process_time()
    run_families(readiness)
    taken_s = time.process_time() - began
    print(f"{1e3 * taken_s:.1f} ms")
    assert taken_s < 0.5


def test_a_standby_tells_only_of_itself(sqlite: Place, tmp_path: Path) -> None:
    readiness = Readiness(sqlite.open(), tmp_path, LeaderGate())
    told = samples(readiness)
    assert told["fedhds_leading", ()] == told["fedhds_ready", ()] == 0
    assert {kind: told["fedhds_not_ready", (kind,)] for kind in PROBLEMS} == {
        kind: float(kind == "standby") for kind in PROBLEMS
    }
    assert ("fedhds_round", ()) not in told
    # A metric without samples is named all the same.
    names = {family.name for family in run_families(readiness)}
    assert names == {measure.name.removesuffix("_total") for measure in MEASURES}


@pytest.mark.parametrize(
    ("said", "label"),
    [("PrivacyError", "PrivacyError"), ("RuntimeError", "other"), ("Path", "other"), ("é\n{", "other")],
)
def test_what_a_site_calls_its_error_makes_up_no_label(said: str, label: str) -> None:
    # The counter is the process's: other tests count as well.
    counter = FAILED.labels("train", label)
    before, labels = counter._value.get(), set(FAILED._metrics)
    count_failure(TaskKind.TRAIN, said)
    assert counter._value.get() == before + 1
    assert set(FAILED._metrics) == labels


def test_a_store_says_whether_its_tables_are_this_programs(place: Place) -> None:
    store = place.leading()
    assert store.up_to_date()
    place.execute("update alembic_version set version_num = '0001'")
    assert not store.up_to_date()
