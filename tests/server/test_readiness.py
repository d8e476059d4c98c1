"""What makes a coordinator ready, and what its metrics say of states, without processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fedhds.spec import RunSpec
from fedhds.tensors.artifact import Artifact
from fedhds_server.counters import FAILED, count_failure
from fedhds_server.leadership.gate import PROBLEMS, LeaderGate
from fedhds_server.leadership.readiness import DISK_RESERVE, Readiness, disk_needed
from fedhds_server.metrics import MEASURES, run_families
from fedhds_server.run.activity import activities
from fedhds_server.run.state import Phase, Reply, RunState
from tests.support.run_states import ADAPTER, leading, of_sites
from tests.support.stores import Place


def samples(readiness: Readiness) -> dict[tuple[str, tuple[str, ...]], float]:
    found = [sample for family in run_families(readiness) for sample in family.samples]
    return {(sample.name, tuple(sample.labels.values())): sample.value for sample in found}


def test_the_disk_must_hold_what_the_open_round_still_writes() -> None:
    assert disk_needed(None) == DISK_RESERVE
    assert disk_needed(RunState(run_id="r", spec=RunSpec.of(model="m", rounds=1))) == DISK_RESERVE
    state = of_sites(4)
    # Three updates to come, the next adapter and its copy.
    assert disk_needed(state) - DISK_RESERVE == 5 * ADAPTER.size
    # While it selects, no update has come, however many reports have.
    assert state.stage
    state.stage.kind, state.stage.replies = "select", {site: Reply(task_id="t") for site in state.stage.cohort}
    assert disk_needed(state) - DISK_RESERVE == 6 * ADAPTER.size
    state.phase, state.stage = Phase.COMPLETED, None
    assert disk_needed(state) - DISK_RESERVE == 2 * ADAPTER.size


def test_the_disk_must_hold_the_optimizers_slots_in_float32() -> None:
    state = of_sites(4)
    state.spec = state.spec.replace(server_optimizer="momentum")
    assert disk_needed(state) - DISK_RESERVE == 6 * ADAPTER.size
    state.slots = {"momentum": Artifact("1" * 64, 2 * ADAPTER.size)}
    assert disk_needed(state) - DISK_RESERVE == 12 * ADAPTER.size


def test_a_state_is_told_in_numbers(sqlite: Place, tmp_path: Path) -> None:
    told = samples(leading(of_sites(4), sqlite, tmp_path))
    assert told["fedhds_updates_accepted_total", ()] == 13
    assert told["fedhds_round_seconds_total", ()] == 6
    assert told["fedhds_received_bytes_total", ()] == 28
    assert (told["fedhds_evaluation", ("loss",)], told["fedhds_evaluation", ("rouge_l",)]) == (2, 0.5)
    assert told["fedhds_cohort_progress_sites", ("answered",)] == 1
    asked = [told[f"fedhds_cohort_{name}", ()] for name in ("sites", "target", "quorum")]
    assert asked == [4, 4, 1]
    phases = {labels[0]: value for (name, labels), value in told.items() if name == "fedhds_run_phase"}
    assert phases == {phase: float(phase == "training") for phase in activities()}
    assert told["fedhds_sites", ("enrolled",)] == 4


def test_equal_updates_of_two_sites_are_two(sqlite: Place, tmp_path: Path) -> None:
    state = of_sites(4)
    assert state.stage
    for name in state.stage.cohort[:2]:
        state.stage.replies[name] = Reply(task_id=state.stage.task_id(name), artifact=Artifact("1" * 64, 9))
    # A site without a row to train on has given none.
    state.stage.replies[state.stage.cohort[2]] = Reply(task_id="", empty=True)
    assert samples(leading(state, sqlite, tmp_path))["fedhds_updates_accepted_total", ()] == 14


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
    count_failure("train", said)
    assert counter._value.get() == before + 1
    assert set(FAILED._metrics) == labels


def test_a_store_says_whether_its_tables_are_this_programs(place: Place) -> None:
    store = place.leading()
    assert store.up_to_date()
    place.execute("update alembic_version set version_num = '0001'")
    assert not store.up_to_date()
