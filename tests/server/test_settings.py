"""The coordinator's settings: flat for people, nested for the code; mistakes name their source."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedhds import settings
from fedhds.errors import SettingsError
from fedhds.spec import FedHdsSpec, LoraSpec, RunSpec
from fedhds_server.settings import ServerSettings

BASE = ["--model", "m", "--rounds", "3"]


def server(*arguments: str, environment: dict[str, str] | None = None) -> ServerSettings:
    return settings.load(
        ServerSettings, program="p", description="d", arguments=arguments, environment=environment or {}
    )


def test_a_model_and_rounds_are_enough() -> None:
    found = server(*BASE)
    assert (found.run.selection.strategy.name, found.listen) == ("fedhds-aligned", "127.0.0.1:8470")
    assert found.run_spec() == RunSpec.of(model="m", rounds=3)


def test_flags_environment_and_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\nrounds: 3\nlora-targets: [q_proj, v_proj]\nlearning-rate: 0.01\ninsecure: true\n"
        "selection-strategy: fedhds\nreduction: pca\nselection-budget: 200\n"
    )
    by_file = server("--config", str(file))
    flags = ["--lora-targets", "q_proj", "v_proj", "--learning-rate", "0.01", "--insecure"]
    selection = ["--selection-strategy", "fedhds", "--reduction", "pca", "--selection-budget", "200"]
    by_flags = server(*BASE, *flags, *selection)
    by_environment = server(
        environment={
            "FEDHDS_MODEL": "m",
            "FEDHDS_ROUNDS": "3",
            "FEDHDS_LORA_TARGETS": "q_proj,v_proj",
            "FEDHDS_LEARNING_RATE": "0.01",
            "FEDHDS_INSECURE": "true",
            "FEDHDS_SELECTION_STRATEGY": "fedhds",
            "FEDHDS_REDUCTION": "pca",
            "FEDHDS_SELECTION_BUDGET": "200",
        }
    )
    assert by_file == by_flags == by_environment
    assert by_file.run.peft == LoraSpec(targets=("q_proj", "v_proj"))
    assert by_file.run.selection.strategy == FedHdsSpec(reduction="pca")


def test_flags_win_over_environment_and_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: file\nrounds: 1\nseed: 1\n")
    environment = {"FEDHDS_CONFIG": str(file), "FEDHDS_ROUNDS": "2", "FEDHDS_SEED": "2"}
    run = server("--seed", "3", environment=environment).run
    assert (run.model.name, run.rounds.count, run.seed) == ("file", 2, 3)


NOISE = ["--selection-clip-norm", "1", "--selection-epsilon", "1", "--selection-noise-multiplier", "1"]


@pytest.mark.parametrize(
    ("arguments", "setting", "words"),
    [
        (["--rounds", "3"], "--model", "FEDHDS_MODEL"),
        (["--model", "m"], "--rounds", "FEDHDS_ROUNDS"),
        ([*BASE, "--model", ""], "--model", "''"),
        ([*BASE, "--cohort-fraction", "1.5"], "--cohort-fraction", "'1.5'"),
        ([*BASE, "--selection-budget", "0%"], "--selection-budget", "'0%'"),
        ([*BASE, "--selection-strategy", "full", "--selection-budget", "5"], "--selection-budget", "all rows"),
        ([*BASE, "--selection-noise-multiplier", "1"], "--selection-clip-norm", "clipping norm"),
        ([*BASE, "--selection-epsilon", "1"], "--selection-clip-norm", "clipping norm"),
        ([*BASE, *NOISE], "--selection-epsilon", "drop"),
        ([*BASE, "--listen", "0.0.0.0:1"], "--listen", "--insecure"),
        ([*BASE, "--listen", "example.org:1"], "--listen", "--insecure"),
        ([*BASE, "--listen", "here"], "--listen", "HOST:PORT"),
        ([*BASE, "--http", "0.0.0.0:1"], "--http", "--insecure"),
        ([*BASE, "--config", "/nowhere.yaml"], "--config", "/nowhere.yaml"),
        ([*BASE, "--kmeans-iterations", "3"], "--kmeans-iterations", "fedhds-aligned has no such parameter; drop it"),
        ([*BASE, "--server-momentum", "0.5"], "--server-momentum", "the server optimizer none has no such parameter"),
        ([*BASE, "--min-cluster-size", "1"], "--min-cluster-size", "'1'"),
    ],
)
def test_mistakes_name_the_flag_and_the_value(arguments: list[str], setting: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)) as caught:
        server(*arguments)
    assert caught.value.setting == setting


def test_mistakes_in_the_environment_and_the_file_name_them(tmp_path: Path) -> None:
    for variable, value, words in [
        ("FEDHDS_ROUNDS", "x", "FEDHDS_ROUNDS: 'x'"),
        ("FEDHDS_LORA_RANK", "0", "FEDHDS_LORA_RANK: '0'"),
        ("FEDHDS_SELECTION_STRATEGY", "x", "FEDHDS_SELECTION_STRATEGY: 'x' is not a known selection strategy"),
        ("FEDHDS_KMEANS_ITERATIONS", "3", "FEDHDS_KMEANS_ITERATIONS: the selection strategy fedhds-aligned has no"),
    ]:
        with pytest.raises(SettingsError, match=re.escape(words)):
            server("--model", "m", environment={"FEDHDS_ROUNDS": "3", variable: value})
    file = tmp_path / "run.yaml"
    for content, words in {
        "model: m\nrounds: x\n": "run.yaml: rounds: 'x'",
        "model: m\nruonds: 1\n": "run.yaml: ruonds: there is no such setting",
        "model: m\nschema-version: 2\n": "run.yaml: schema-version: there is no such setting",
        "model: m\nrounds: 1\nselection: {budget: 5}\n": "run.yaml: selection: there is no such setting",
        "model: m\nrounds: 1\nquorum: true\n": "run.yaml: quorum: 'true' is not valid",
        "model: m\nrounds: 1\nselection-strategy: [full]\n": "run.yaml: selection-strategy: ['full'] is not a known",
        "model: m\nrounds: 1\nselection-strategy: full\nreduction: pca\n": "run.yaml: reduction: the selection strat",
    }.items():
        file.write_text(content)
        with pytest.raises(SettingsError, match=re.escape(words)):
            server("--config", str(file))


def test_an_epsilon_becomes_noise_for_all_releases_of_the_run() -> None:
    privacy = ["--selection-clip-norm", "1", "--selection-epsilon", "8"]

    def noise(*arguments: str) -> float:
        return server(*BASE, *privacy, *arguments).run_spec().privacy.selection.noise_multiplier

    once = noise()
    assert noise("--selection-schedule", "per-round") == pytest.approx(once * 3**0.5, rel=1e-3)
    # 13 iterations, and the number of rows.
    assert noise("--selection-strategy", "federated-kmeans") == pytest.approx(once * 14**0.5, rel=1e-3)
    # A strategy that releases nothing has nothing to add noise to.
    assert noise("--selection-strategy", "random") == 0


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings.load(ServerSettings, program="p", description="d", arguments=["--help"], environment={})
    shown = capsys.readouterr().out
    for setting in settings.settings_of(ServerSettings):
        assert settings.flag(setting.name) in shown
        assert settings.variable(setting.name) in shown
        assert setting.field.description
    assert "Undefined" not in shown


def test_groups_come_in_the_order_in_which_people_decide() -> None:
    groups = re.findall(r"^### (.*)$", settings.reference(ServerSettings), re.MULTILINE)
    assert groups == [
        "Model",
        "PEFT",
        "Training",
        "Selection",
        "Privacy",
        "Aggregation",
        "Secure aggregation",
        "Rounds",
        "Evaluation",
        "Server",
        "Sites",
    ]


def test_settings_import_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "sklearn", "numpy", "grpc", "google.protobuf", "yaml")
    code = (
        "import sys, fedhds_server.settings\n"
        f"loaded = [name for name in {heavy!r} if name in sys.modules]\n"
        "sys.exit(f'imports {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
