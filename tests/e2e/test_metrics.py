"""/metrics of a real run, and the alerts, the dashboard and the documentation that name what is in it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from docs.generate import OPERATIONS, operations
from tests.support import programs
from tests.support.federation import Federation
from tests.support.scrapes import FLAG, Scrape, scrape, until
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
RUNBOOK = ROOT / "docs" / "runbook"
RULES = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "fedhds.json").read_text(encoding="utf-8"))


class Scraped(NamedTuple):
    server: Scrape
    client: Scrape
    status: dict[str, Any]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Scraped]:
    """A paused run with rounds, an evaluation and a release, at rest: what is scraped is what the status says."""
    federation = Federation(tmp_path_factory.mktemp("metrics"), model)
    try:
        server = federation.server(
            *(
                "--rounds=400",
                "--selection-strategy=fedhds",
                "--min-evaluators=1",
                "--min-sites=1",
                "--evaluate-every=1",
            ),
            *("--selection-clip-norm=1", "--selection-noise-multiplier=2", "--released-centroids=2", FLAG),
        )
        rows = write_rows(federation.folder / "a.jsonl", {"sun": 20, "sea": 20})
        held_out = write_rows(federation.folder / "held-out.jsonl", {"sun": 5})
        client = federation.client("a", f"--data={rows}", f"--eval-data={held_out}", FLAG)
        server.wait_for("after round 2, a measures")
        address = f"--server={federation.address()}"
        programs.run("fedhds", "pause", address, "--reason=to look").check_returncode()
        until(lambda: scrape(client)("fedhds_client_sites", activity="waiting") == 1)
        status = programs.run("fedhds", "status", "--json", address)
        yield Scraped(scrape(server), scrape(client), json.loads(status.stdout))
    finally:
        federation.stop()


def named(expression: str) -> set[str]:
    """The metrics of a PromQL expression; of a histogram its own name."""
    names = set(re.findall(r"\b(?:fedhds|process)_[a-z_]+", expression))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def test_the_metrics_tell_what_the_status_tells(scraped: Scraped) -> None:
    server, client, status = scraped
    assert server("fedhds_run_phase", phase=status["phase"]) == 1
    assert server("fedhds_run_paused") == server("fedhds_leading") == server("fedhds_ready") == 1
    assert server("fedhds_round") == status["round_number"]
    assert server("fedhds_rounds_planned") == 400
    closed = status["closed_rounds"]
    assert server("fedhds_rounds_closed_total") == len(closed) >= 2
    assert server("fedhds_last_round_seconds") == pytest.approx(closed[-1]["seconds"])
    assert server("fedhds_round_seconds_total") == pytest.approx(sum(line["seconds"] for line in closed))
    assert server("fedhds_updates_accepted_total") >= sum(len(line["contributors"]) for line in closed)
    last = status["evaluations"][-1]
    assert server("fedhds_evaluation_round") == last["round_number"] >= 2
    assert set(last["metrics"]) == {"answer_tokens", "loss", "rouge_l", "rouge_l_unique"}
    for name, mean in last["metrics"].items():
        assert server("fedhds_evaluation", metric=name) == pytest.approx(mean)
    # Under noise the site states the rows of --stated-rows, not its own.
    assert server("fedhds_pool_rows") == int(status["pool_rows"]) == 1000
    assert client("fedhds_client_rows", use="train") == 40
    assert server("fedhds_sites", state="enrolled") == 1
    # The client does not count the few bytes in which it asks for transfers.
    sent = client("fedhds_client_sent_bytes_total")
    assert server("fedhds_received_bytes_total") == pytest.approx(sent, rel=0.2)
    assert server("fedhds_downloaded_bytes_total") > 0
    for name in ("store_save", "selection", "aggregation"):
        assert server(f"fedhds_{name}_seconds_count") > 0, name
    assert server("fedhds_aggregation_seconds_count") == len(closed)


def test_a_client_tells_its_work_and_what_it_has_spent(scraped: Scraped) -> None:
    client = scraped.client
    assert client("fedhds_client_connected") == 1
    assert client("fedhds_client_rows", use="evaluate") == 5
    assert client("fedhds_client_task_seconds_count", task="select") == 1
    assert client("fedhds_client_task_seconds_count", task="train") >= 2
    # Its selection was noised, its adapters were not.
    assert client("fedhds_client_epsilon", unit="client") == client("fedhds_client_epsilon", unit="example") == math.inf


def test_no_label_names_a_site(scraped: Scraped) -> None:
    for metrics in (scraped.server, scraped.client):
        keys = {key for _, labels in metrics.samples for key, _ in labels}
        assert not keys & {"site", "name"}
        assert not [labels for _, labels in metrics.samples if "a" in dict(labels).values()]


def test_every_metric_is_documented_and_no_other(scraped: Scraped) -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    assert text == operations(), "run `make docs`"
    documented = set(re.findall(r"^\| `(fedhds_[a-z_]+)`", text, flags=re.MULTILINE))
    both = scraped.server.named | scraped.client.named
    assert documented == {name for name in both if name.startswith("fedhds_")}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_names_metrics_that_exist_and_has_a_page(rule: dict[str, Any], scraped: Scraped) -> None:
    assert named(rule["expr"])
    assert named(rule["expr"]) <= scraped.server.named | scraped.client.named
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["runbook"] == f"docs/runbook/{rule['alert']}.md"
    page = (RUNBOOK / f"{rule['alert']}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {rule['alert']}\n")
    for part in ("**What it means.**", "**How to look.**", "**What to do.**"):
        assert part in page
    for name in named(page):
        assert name in scraped.server.named | scraped.client.named, name
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (RUNBOOK / link).exists(), link


def test_every_page_of_the_runbook_is_an_alerts() -> None:
    assert {page.stem for page in RUNBOOK.glob("*.md")} == {rule["alert"] for rule in RULES}


def test_the_dashboard_shows_metrics_that_exist(scraped: Scraped) -> None:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    shown = set().union(*map(named, expressions))
    assert shown <= scraped.server.named | scraped.client.named
    # What is not shown is on purpose.
    hidden = {"fedhds_run_info", "fedhds_run_paused"}
    told = {name for name in scraped.server.named | scraped.client.named if name.startswith("fedhds_")}
    assert told - shown == hidden
    spots = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(spots)) == len({panel["id"] for panel in DASHBOARD["panels"]}) == len(spots)


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: apt-get install prometheus)")
@pytest.mark.parametrize(("verb", "file"), [("check", ALERTS), ("test", ROOT / "tests" / "e2e" / "alerts_test.yml")])
def test_prometheus_accepts_the_alerts_and_they_fire_when_they_should(verb: str, file: Path) -> None:
    done = subprocess.run(["promtool", verb, "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
