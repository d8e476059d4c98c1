"""A whole run by the installed console scripts, and what it leaves behind."""

from __future__ import annotations

import json

import pytest

from fedhds.privacy.ledger import Ledger
from fedhds.security.identity import Role
from fedhds.security.pki import init_authority, issue
from fedhds.spec import STRATEGY_SPECS
from tests.support.federation import Federation
from tests.support.launch import launched
from tests.support.programs import BIN
from tests.support.tiny import logits, make_model, write_rows

pytestmark = pytest.mark.e2e


# A run of each, and what it needs besides: a targeted one goes with filters before it.
FILTERED = ["--selection-budget=7", "--selection-filters=length,alignment"]
SETTINGS: dict[str, list[str]] = {"full": [], "fedhds": [], "target-features": FILTERED}
LONG = {"target-gradients"}


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in STRATEGY_SPECS]
)
def test_a_run_ends_with_an_adapter_that_peft_loads_and_every_site_has(federation: Federation, strategy: str) -> None:
    folder = federation.folder
    server = federation.server(
        "--rounds=2",
        f"--selection-strategy={strategy}",
        *SETTINGS.get(strategy, ["--selection-budget=7"]),
        "--min-evaluators=1",
        "--evaluate-every=1",
        "--learning-rate=0.01",
        "--model-license=apache-2.0",
        "--data-license=cc0-1.0",
    )
    shards = [
        write_rows(folder / f"{name}.jsonl", topics)
        for name, topics in {"a": {"sun": 12, "moon": 9}, "b": {"sun": 8, "sea": 14}}.items()
    ]
    unseen = write_rows(folder / "unseen.jsonl", {"star": 5})
    wanted = write_rows(folder / "wanted.jsonl", {"sea": 6})
    sites = [
        federation.client("a", f"--data={shards[0]}", f"--target-data={wanted}", "--allow-exact-kmeans-sums"),
        federation.client("b", f"--data={shards[1]}", "--allow-exact-kmeans-sums"),
        federation.client("e", f"--eval-data={unseen}"),
    ]
    assert server.wait() == 0, server.text
    assert [site.wait() for site in sites] == [0, 0, 0], "\n".join(site.text for site in sites)

    report = json.loads((folder / "run" / "report.json").read_text())
    assert report["phase"] == "completed"
    selection = json.loads((folder / "run" / "selection-0.json").read_text())
    assert selection["strategy"] == strategy
    pages = list((folder / "state").glob("*/*/reports/*/*/report.html"))
    # What the coordinator knows of groups, and every site of its own rows, stands where its people find it.
    assert bool(pages) == bool(selection["groups"]) == (strategy not in ("full", "random"))
    assert [entry["round_number"] for entry in report["evaluations"]] == [0, 1, 2]
    trained, pool = int(report["trained_rows"]), int(report["pool_rows"])
    assert pool == 43
    assert {"full": trained == 43, "fedhds": 0 < trained < 43}.get(strategy, trained == 7), trained

    checkpoint = folder / "run" / "checkpoint"
    expected = logits(federation.model, checkpoint)
    for name in ("a", "b", "e"):
        adapter = folder / "out" / name
        assert sorted(file.name for file in adapter.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "generation_config.json",
        ]
        assert (adapter / "generation_config.json").read_bytes() == (checkpoint / "generation_config.json").read_bytes()
        assert json.loads((adapter / "generation_config.json").read_text()) == {"eos_token_id": [2]}
        assert (adapter / "adapter_model.safetensors").read_bytes() == (
            checkpoint / "adapter_model.safetensors"
        ).read_bytes()
        assert logits(federation.model, adapter) == expected
    card = (checkpoint / "README.md").read_text()
    assert "apache-2.0" in card
    assert "cc0-1.0" in card


def test_the_same_run_gives_the_same_adapter_whatever_the_order_of_arrival(federation: Federation) -> None:
    folder = federation.folder
    for name in "ab":
        write_rows(folder / f"{name}.jsonl", {name: 6})
    digests = []
    for run, order in (("first", "ab"), ("second", "ba")):
        server = federation.server("--rounds=2", "--selection-strategy=full", run=run)
        address = federation.address(run)
        for name in order:
            site = federation.client(name, f"--data={folder / name}.jsonl", server=address)
            site.wait_for("enrolled in run")
        assert server.wait() == 0, server.text
        digests.append((folder / run / "checkpoint" / "adapter_model.safetensors").read_bytes())
        for daemon in federation.daemons:
            daemon.wait()
    assert digests[0] == digests[1]


def test_several_shards_in_one_process_are_several_sites_and_tls_gives_their_names(federation: Federation) -> None:
    folder = federation.folder
    federation.tls = folder / "certs"
    init_authority(federation.tls)
    issue(federation.tls, "coordinator", role=Role.COORDINATOR, hosts=("127.0.0.1",))
    issue(federation.tls, "hospital", role=Role.SITE)
    shards = [write_rows(folder / f"ward-{number}.jsonl", {"sun": 6, "sea": 6}) for number in (1, 2, 3)]
    server = federation.server(
        "--rounds=2", "--selection-schedule=per-round", "--min-sites=1", "--max-shards=3", "--cohort-fraction=0.67"
    )
    process = federation.client("hospital", "--data", *shards, f"--eval-data={shards[0]}")
    assert server.wait() == 0, server.text
    assert process.wait() == 0, process.text
    report = json.loads((folder / "run" / "report.json").read_text())
    assert [site["site"] for site in report["sites"]] == [f"hospital/ward-{number}" for number in (1, 2, 3)]
    assert process.text.count("loading the base model") == 1
    assert len(report["evaluations"]) == 2


@pytest.mark.parametrize("strategy", ["fedhds", pytest.param("full", marks=pytest.mark.long)])
def test_a_site_of_two_processes_is_one_site(federation: Federation, strategy: str) -> None:
    """Under accelerate the second process takes its share of the features, and stops with the first."""
    folder = federation.folder
    budget = [] if strategy == "full" else ["--selection-budget=30"]
    server = federation.server("--rounds=1", f"--selection-strategy={strategy}", *budget, "--min-sites=2")
    shards = [write_rows(folder / f"{name}.jsonl", {"sun": 12, "moon": 9}) for name in "ab"]
    flags = federation.client_flags("site", "--data", *shards)
    flags = [*(flag for flag in flags if flag != "--name=site"), "--name", "a", "b"]
    site = federation.start("site", *launched(["--no_python", str(BIN / "fedhds-client"), *map(str, flags)]))
    assert (server.wait(), site.wait()) == (0, 0), server.text + site.text
    assert "2 updates" in server.text
    assert site.text.count("the final adapter is in") == 2
    if strategy == "fedhds":
        assert "taking the features of 21 rows" in site.text


def test_features_may_be_taken_with_another_model_which_all_sites_must_hold(federation: Federation) -> None:
    folder = federation.folder
    other, third = (
        make_model(folder / name, seed=seed, hidden=16, layers=1) for name, seed in (("other", 7), ("third", 8))
    )
    shards = [write_rows(folder / f"{name}.jsonl", {"sun": 12, "moon": 9}) for name in "ab"]
    flags = (
        "--rounds=1",
        "--selection-strategy=fedhds-aligned",
        "--selection-budget=6",
        "--reduction=pca",
        f"--feature-model={other}",
    )
    server, allowed = federation.server(*flags), f"--allow-feature-model={other}"
    first = federation.client("a", f"--data={shards[0]}", allowed)
    first.wait_for(f"loading the feature model {other}")
    server.wait_for("site a enrolled")
    # The same name, other weights: what such a site clusters could not be compared.
    other.rename(folder / "kept")
    third.rename(other)
    odd = federation.client("odd", f"--data={shards[1]}", allowed)
    assert odd.wait() == 1
    assert "the feature model differ" in odd.text
    other.rename(third)
    (folder / "kept").rename(other)
    second = federation.client("b", f"--data={shards[1]}", allowed)
    assert (server.wait(), first.wait(), second.wait()) == (0, 0, 0), server.text + first.text + second.text
    assert json.loads((folder / "run" / "report.json").read_text())["trained_rows"] == "6"


def test_noised_centroids_are_printed_recorded_and_bounded(federation: Federation) -> None:
    folder = federation.folder
    server = federation.server(
        "--rounds=1", "--min-sites=1", "--selection-clip-norm=5", "--selection-epsilon=50", "--released-centroids=4"
    )
    site = federation.client("a", f"--data={write_rows(folder / 'a.jsonl', {'sun': 20, 'sea': 20, 'sky': 20})}")
    server.wait()
    site.wait()
    assert "epsilon" in site.text
    entry, adapter = Ledger(folder / "ledger.db").entries()
    assert entry.unit == "client"
    assert 49 < (entry.epsilon or 0) <= 50.01
    assert (adapter.release, adapter.epsilon) == ("adapter", None)


def test_a_site_refuses_to_release_more_than_its_own_epsilon(federation: Federation) -> None:
    folder = federation.folder
    federation.server("--rounds=1", "--min-sites=1", "--heartbeat-timeout=5")
    shard = write_rows(folder / "a.jsonl", {"sun": 20, "sea": 20})
    site = federation.client("a", f"--data={shard}", "--selection-max-epsilon=3")
    assert site.wait() == 1
    assert "Traceback" not in site.text
    # Its own line has the code; the class is in what the coordinator says about the end.
    assert "PrivacyError" not in site.text.partition("no site could select")[0]
    assert "epsilon" in site.text
    assert not Ledger(folder / "ledger.db").entries()
