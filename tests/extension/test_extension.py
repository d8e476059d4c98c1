"""Every extension point from one file outside the packages, plugin.py, in a real run that also survives kill -9."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedhds.privacy.ledger import Ledger
from tests.support import programs
from tests.support.federation import PATIENCE_S, Federation
from tests.support.tiny import make_model, write_rows

pytestmark = pytest.mark.e2e

PLUGIN = Path(__file__).with_name("plugin.py")
ROUNDS, BUDGET, RATE, TAU = 3, 9, 0.05, 1e-2
FLAGS = (
    f"--rounds={ROUNDS}",
    "--selection-strategy=central",
    "--central-share=0.75",
    f"--selection-budget={BUDGET}",
    "--aggregator=median",
    "--median-odd-role=attention",
    "--server-optimizer=zero-adagrad",
    f"--adagrad-learning-rate={RATE}",
    f"--adagrad-tau={TAU}",
    "--peft-method=scaling",
    "--scaling-targets=v_proj",
    "--learning-rate=0.05",
    "--feature-dimension=16",
    "--max-length=256",
    "--max-new-tokens=4",
    "--min-evaluators=1",
    "--evaluate-every=1",
    "--quorum=100%",
    # Longer than a site stands still on a busy machine.
    "--heartbeat-timeout=120",
    "--keep-updates",
)


@dataclass(frozen=True)
class Outcome:
    """What a run left behind."""

    folder: Path
    status: dict[str, Any]
    """What `fedhds status --json` said in mid-run, of the run that nothing disturbed."""
    log: str
    """All that its coordinators printed."""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def report(self) -> dict[str, Any]:
        """report.json."""
        content: dict[str, Any] = json.loads((self.run / "report.json").read_text())
        return content

    @property
    def state(self) -> dict[str, Any]:
        """The durable state; as JSON, because this process does not have the plug-in's names."""
        with sqlite3.connect(self.run / "run.db") as database:
            [(text,)] = database.execute("SELECT state FROM run").fetchall()
        state: dict[str, Any] = json.loads(text)
        return state

    def artifact(self, reference: dict[str, Any]) -> dict[str, Any]:
        """The tensors of an artifact that the state names."""
        return load_file(self.run / "artifacts" / reference["digest"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base model."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def carry_out(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[..., Outcome]]:
    """Runs two sites and an evaluator to the end; `killed`: the coordinator dies in round 2 and is started again."""
    federations: list[Federation] = []

    def run(*, killed: bool) -> Outcome:
        federation = Federation(tmp_path_factory.mktemp("killed" if killed else "undisturbed"), model)
        federations.append(federation)
        folder = federation.folder

        def serve(listen: str) -> Any:
            where = (f"--model={model}", f"--run-folder={folder / 'run'}", f"--listen={listen}")
            daemon = federation.start("server", sys.executable, PLUGIN, "server", *where, *FLAGS)
            daemon.wait_for("listens on")
            daemon.wait_for(" run ")
            return daemon

        servers = [serve("127.0.0.1:0")]
        address = federation.address()
        rows = {
            "a": write_rows(folder / "a.jsonl", {"sun": 8, "moon": 5}),
            "b": write_rows(folder / "b.jsonl", {"sun": 4, "tide": 5}),
            "e": write_rows(folder / "e.jsonl", {"star": 5}),
        }
        sites = {
            name: federation.start(
                name,
                *(sys.executable, PLUGIN, "client", f"--name={name}", f"--server={address}"),
                *(f"--state={folder / 'state' / name}", f"--out={folder / 'out' / name}"),
                f"--ledger={folder / 'ledger.db'}",
                f"--{'eval-' * (name == 'e')}data={path}",
            )
            for name, path in rows.items()
        }
        servers[0].wait_for(f"round 2 of {ROUNDS} opens")
        status: dict[str, Any] = {}
        if killed:
            servers[0].kill()
            servers.append(serve(address))
        else:
            # While one site stands still, the run cannot end.
            sites["b"].process.send_signal(signal.SIGSTOP)
            status = evaluated(address)
            sites["b"].process.send_signal(signal.SIGCONT)
        for daemon in (servers[-1], *sites.values()):
            assert daemon.wait() == 0, daemon.text
        return Outcome(folder, status, "\n".join(server.text for server in servers))

    yield run
    for federation in federations:
        federation.stop()


def evaluated(address: str) -> dict[str, Any]:
    """What `fedhds status --json` says once there is an evaluation."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        status: dict[str, Any] = json.loads(programs.run("fedhds", "status", f"--server={address}", "--json").stdout)
        if status["evaluations"] or time.monotonic() > deadline:
            return status
        time.sleep(0.2)


@pytest.fixture(scope="module")
def outcome(carry_out: Callable[..., Outcome]) -> Outcome:
    """Of the run that nothing disturbed."""
    return carry_out(killed=False)


def test_the_parameters_of_a_plug_in_are_flags() -> None:
    text = subprocess.run([sys.executable, PLUGIN, "server", "--help"], check=True, capture_output=True, text=True)
    words = " ".join(text.stdout.split())
    for flag in ("median-odd-role", "adagrad-learning-rate", "adagrad-tau", "scaling-feedforward", "central-share"):
        assert f"--{flag} " in words
    for name, summary in (
        ("median", "their median"),
        ("zero-adagrad", "with a step"),
        ("central", "rows near the mean"),
    ):
        assert f"{name}: {summary}" in words


def test_reports_and_status_name_what_ran(outcome: Outcome) -> None:
    for told in (outcome.report, outcome.status):
        spec = told["spec"]
        assert spec["selection"]["strategy"] == {"name": "central", "share": 0.75}
        assert spec["aggregation"]["aggregator"] == {"name": "median", "odd_role": "attention"}
        assert spec["aggregation"]["optimizer"] == {"name": "zero-adagrad", "learning_rate": RATE, "tau": TAU}
        assert spec["peft"] == {"method": "scaling", "targets": ["v_proj"], "feedforward": ["down_proj"]}
    card = (outcome.run / "checkpoint" / "README.md").read_text()
    for words in (
        "median of the updates, value by value",
        "zero-adagrad: with a step per value that shrinks",
        "scaling",
        "| selection | central",
        "sums of feat",
    ):
        assert words in card


def test_the_strategy_takes_two_steps_with_messages_of_its_own(outcome: Outcome) -> None:
    selection = json.loads((outcome.run / "selection-0.json").read_text())
    assert selection["strategy"] == "central"
    # Three quarters of 13 and of 9 rows, rounded up.
    assert selection["notes"] == ["central: 17 rows are near the mean of 2 sites"]
    assert int(outcome.report["trained_rows"]) == BUDGET
    for site in "ab":
        releases = Ledger(outcome.folder / "ledger.db").entries()
        tasks = [each.task_id for each in releases if each.release == "sums" and each.task_id.endswith(f"/{site}")]
        assert len(tasks) == 2
        assert tasks[0] == f"select/0/{site}"
        # The second step is named after its request.
        assert tasks[1].startswith("select/0.1-")


def test_aggregator_and_optimizer_make_the_adapter_from_the_updates(outcome: Outcome) -> None:
    state = outcome.state
    adapters = [outcome.artifact(state["adapters"][str(number)]) for number in range(ROUNDS + 1)]
    assert state["slots"].keys() == {"squares"}
    squares = {name: np.zeros_like(value) for name, value in adapters[0].items()}
    for number in range(1, ROUNDS + 1):
        folder = outcome.run / "artifacts" / "updates" / f"round-{number}"
        updates = [load_file(folder / f"{site}.safetensors") for site in "ab"]
        for name, before in adapters[number - 1].items():
            after = adapters[number][name]
            if number % 2 and "down_proj" in name:
                # Of another role: nobody trained it in this round, and nothing stepped.
                assert np.array_equal(after, before)
                assert all(name not in update for update in updates)
                continue
            difference = np.median([update[name] for update in updates], axis=0) - before
            assert np.abs(difference).max() > 0
            squares[name] += difference**2
            expected = before + RATE * difference / (np.sqrt(squares[name]) + TAU)
            np.testing.assert_allclose(after, expected, rtol=1e-5)
    slot = outcome.artifact(state["slots"]["squares"])
    for name, value in squares.items():
        np.testing.assert_allclose(slot[name], value, rtol=1e-4, atol=1e-12)


def test_peft_loads_the_final_adapter_as_ia3(outcome: Outcome, model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = outcome.run / "checkpoint"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["peft_type"] == "IA3"
    # The first values are ones, so that a new adapter changes nothing.
    first = outcome.artifact(outcome.state["adapters"]["0"])
    assert all((value == 1).all() for value in first.values())
    plain: Any = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[1, 40, 41, 42]])
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        tuned: Any = PeftModel.from_pretrained(plain, str(checkpoint)).eval()
        assert not torch.allclose(tuned(input_ids=ids).logits, before, atol=1e-4)
    for site in "abe":
        delivered = outcome.folder / "out" / site / "adapter_model.safetensors"
        assert delivered.read_bytes() == (checkpoint / "adapter_model.safetensors").read_bytes()


def test_the_metric_is_measured_and_shown(outcome: Outcome) -> None:
    evaluations = outcome.report["evaluations"]
    assert [entry["round_number"] for entry in evaluations] == [*range(ROUNDS + 1)]
    for entry in (*evaluations, *outcome.status["evaluations"]):
        assert entry["metrics"].keys() == {"answer_length", "answer_tokens", "loss", "rouge_l", "rouge_l_unique"}
        assert entry["metrics"]["answer_length"] >= 0
    assert "answer length (characters)" in (outcome.run / "checkpoint" / "README.md").read_text()


def test_the_observer_writes_its_file(outcome: Outcome) -> None:
    assert sorted((outcome.run / "diary.txt").read_text().splitlines()) == diary(outcome)


@pytest.mark.long
def test_a_run_whose_coordinator_was_killed_ends_with_the_same_bytes(
    carry_out: Callable[..., Outcome], outcome: Outcome
) -> None:
    killed = carry_out(killed=True)
    assert "going on with run" in killed.log
    adapters = [run.run / "checkpoint" / "adapter_model.safetensors" for run in (outcome, killed)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    for run in (outcome, killed):
        assert "Traceback" not in run.log
    for name in ("adapters", "slots", "evaluations", "coresets"):
        assert killed.state[name] == outcome.state[name]
    assert sorted((killed.run / "diary.txt").read_text().splitlines()) == diary(killed)


def diary(outcome: Outcome) -> list[str]:
    """The lines of diary.txt, each once, in order of the alphabet."""
    return sorted(
        [
            f"run {outcome.report['run_id']}: median, zero-adagrad",
            *(f"round {number}: a, b" for number in range(1, ROUNDS + 1)),
            *(
                f"evaluation {number}: e, answer_length, answer_tokens, loss, rouge_l, rouge_l_unique"
                for number in range(ROUNDS + 1)
            ),
            f"completed: {outcome.report['message']}",
        ]
    )
