"""Flags, environment and YAML say the same things; mistakes name their source."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import pytest
from pydantic import Field, model_validator

from docs.generate import TARGET, configuration
from fedhds import settings
from fedhds.errors import SettingsError
from fedhds.settings import Parameters, Variants, parameter
from fedhds.spec import STRATEGY_SPECS, RunSpec, budget_rows
from fedhds_client.settings import ClientSettings
from fedhds_server.settings import ServerSettings

BASE = ["--model", "m", "--rounds", "3"]


def server(*arguments: str, environment: dict[str, str] | None = None) -> ServerSettings:
    return settings.load(
        ServerSettings, program="p", description="d", arguments=arguments, environment=environment or {}
    )


def client(*arguments: str) -> ClientSettings:
    return settings.load(ClientSettings, program="p", description="d", arguments=arguments, environment={})


def test_a_model_and_rounds_are_enough() -> None:
    loaded = server(*BASE)
    assert (loaded.run.selection.strategy.name, loaded.listen) == ("fedhds-aligned", "127.0.0.1:8470")
    assert loaded.run_spec() == RunSpec.of(model="m", rounds=3)


def test_flags_environment_and_file_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nrounds: 3\nlora-targets: [q_proj, v_proj]\nlearning-rate: 0.01\ninsecure: true\n")
    by_file = server("--config", str(file))
    flags = ["--lora-targets", "q_proj", "v_proj", "--learning-rate", "0.01", "--insecure"]
    by_flags = server(*BASE, *flags)
    by_environment = server(
        environment={
            "FEDHDS_MODEL": "m",
            "FEDHDS_ROUNDS": "3",
            "FEDHDS_LORA_TARGETS": "q_proj,v_proj",
            "FEDHDS_LEARNING_RATE": "0.01",
            "FEDHDS_INSECURE": "true",
        }
    )
    assert by_file == by_flags == by_environment


def test_flags_win_over_environment_and_environment_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: file\nrounds: 1\nseed: 1\n")
    environment = {"FEDHDS_CONFIG": str(file), "FEDHDS_ROUNDS": "2", "FEDHDS_SEED": "2"}
    run = server("--seed", "3", environment=environment).run
    assert (run.model.name, run.rounds.count, run.seed) == ("file", 2, 3)


@pytest.mark.parametrize(
    ("arguments", "setting", "words"),
    [
        (["--rounds", "3"], "--model", "FEDHDS_MODEL"),
        ([*BASE, "--cohort-fraction", "1.5"], "--cohort-fraction", "'1.5'"),
        ([*BASE, "--selection-budget", "0%"], "--selection-budget", "'0%'"),
        ([*BASE, "--selection-strategy", "full", "--selection-budget", "5"], "--selection-budget", "all rows"),
        ([*BASE, "--selection-noise-multiplier", "1"], "--selection-clip-norm", "clipping norm"),
        ([*BASE, "--selection-epsilon", "1"], "--selection-clip-norm", "clipping norm"),
        (
            [*BASE, "--selection-clip-norm", "1", "--selection-epsilon", "1", "--selection-noise-multiplier", "1"],
            "--selection-epsilon",
            "drop",
        ),
        ([*BASE, "--kmeans-iterations", "3"], "--kmeans-iterations", "fedhds-aligned has no such parameter"),
        ([*BASE, "--listen", "0.0.0.0:1"], "--listen", "--insecure"),
        ([*BASE, "--listen", "example.org:1"], "--listen", "--insecure"),
        ([*BASE, "--listen", "here"], "--listen", "HOST:PORT"),
        ([*BASE, "--http", "0.0.0.0:1"], "--http", "--insecure"),
        ([*BASE, "--config", "/nowhere.yaml"], "--config", "/nowhere.yaml"),
    ],
)
def test_mistakes_name_the_flag_and_the_value(arguments: list[str], setting: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)) as caught:
        server(*arguments)
    assert caught.value.setting == setting


def test_mistakes_in_the_environment_and_the_file_name_them(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="FEDHDS_ROUNDS: 'x'"):
        server("--model", "m", environment={"FEDHDS_ROUNDS": "x"})
    file = tmp_path / "run.yaml"
    for content, words in {
        "model: m\nrounds: x\n": "run.yaml: rounds: 'x'",
        "model: m\nruonds: 1\n": "run.yaml: ruonds: there is no such setting",
        "- model\n": "must hold settings",
        "model: [\n": "not valid YAML",
        "model: m\nrounds: 0b_\n": "run.yaml: rounds: '0b_'",
        "model: m\nrounds: 1:20\n": "run.yaml: rounds: '1:20'",
        "model: m\nrounds: true\n": "run.yaml: rounds: 'true'",
        "model: m\nrounds: 1\ninsecure: maybe\n": "run.yaml: insecure: 'maybe'",
        "model: m\nrounds: 1\nrounds: 2\n": "rounds is set twice",
        "model: m\nlora-rank: 1\nlora_rank: 2\n": "lora_rank is set twice",
        'model: "a\\udcff"\n': "run.yaml: model: it has bytes that are not UTF-8",
        "model: !!timestamp 2026-13-45\n": "not valid YAML",
        "model: " + "[" * 5000: "not valid YAML",
    }.items():
        file.write_text(content)
        with pytest.raises(SettingsError, match=re.escape(words)):
            server("--config", str(file))


@pytest.mark.parametrize(
    "text",
    [
        "0123",
        "no",
        "on",
        "1e3",
        "1.10",
        "1:20",
        "0x1F",
        "1_000",
        "2024-01-01",
        "2026-13-45",
        ".inf",
        "=",
        "none",
        "'~'",
    ],
)
def test_a_text_in_the_file_is_what_is_written(tmp_path: Path, text: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"data: {text}\nname: {text}\ntls-ca: {text}\n")
    loaded = client("--config", str(file))
    written = text.strip("'")
    assert (loaded.name, loaded.data, loaded.tls_ca) == ((written,), (Path(written),), Path(written))
    file.write_text(f"model: m\nrounds: 2\nmodel-revision: {text}\nlora-targets: [0123, no]\n")
    spec = settings.flat(server("--config", str(file)).run)
    assert (spec["model_revision"], spec["lora_targets"]) == (written, ("0123", "no"))


@pytest.mark.parametrize("null", ["", "~", "null"])
def test_null_in_the_file_is_no_text(tmp_path: Path, null: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(f"data: a.jsonl\nname: {null}\n")
    assert client("--config", str(file)).name is None
    file.write_text(f"model: m\nrounds: 2\nmodel-license: {null}\n")
    with pytest.raises(SettingsError, match=r"site.yaml: model-license: None is not valid"):
        server("--config", str(file))


def test_numbers_and_switches_in_the_file_mean_what_they_mean_after_a_flag(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\nrounds: 010\nlearning-rate: 1e-3\nseed: 1_000\ninsecure: Yes\nkeep-updates: off\n")
    loaded = server("--config", str(file))
    assert (loaded.run.rounds.count, loaded.run.training.learning_rate, loaded.run.seed) == (10, 0.001, 1000)
    assert (loaded.insecure, loaded.keep_updates) == (True, False)


def test_a_text_that_is_not_utf_8_is_refused_but_a_file_name_may_be_any() -> None:
    not_utf_8 = os.fsdecode(b"ward-\xe9")
    with pytest.raises(SettingsError, match=r"--name: .* not UTF-8"):
        client("--data", "a.jsonl", "--name", not_utf_8)
    with pytest.raises(SettingsError, match=r"--lora-targets: .* not UTF-8"):
        server(*BASE, "--lora-targets", "q_proj", not_utf_8)
    with pytest.raises(SettingsError, match=r"FEDHDS_MODEL: .* not UTF-8"):
        server("--rounds", "3", environment={"FEDHDS_MODEL": not_utf_8})
    assert client("--data", f"{not_utf_8}.jsonl").data == (Path(f"{not_utf_8}.jsonl"),)


IPV6_WITHOUT_BRACKETS = {
    "::1:8470": "[::1]:8470",
    "2001:db8::5:8470": "[2001:db8::5]:8470",
    "1:2:3:4:5:6:7:8:8470": "[1:2:3:4:5:6:7:8]:8470",
    "fe80::1%eth0:8470": "[fe80::1%eth0]:8470",
    "::ffff:10.0.0.1:8470": "[::ffff:10.0.0.1]:8470",
    "[::1:8470]": "[::1]:8470",
    ":::8470": "[::]:8470",
    "fe80::abcd": "[fe80::abcd]:PORT",
    "[::1]": "[::1]:PORT",
}


@pytest.mark.parametrize(("address", "right"), IPV6_WITHOUT_BRACKETS.items())
def test_an_ipv6_address_needs_brackets_and_the_message_writes_them(address: str, right: str) -> None:
    words = re.escape(f"{address!r} is not HOST:PORT; an IPv6 address needs brackets and a port: {right}")
    with pytest.raises(SettingsError, match=f"--server: {words}"):
        client("--data", "a.jsonl", "--server", f"localhost:8470,{address}")
    with pytest.raises(SettingsError, match=f"--http: {words}"):
        client("--data", "a.jsonl", "--http", address)
    with pytest.raises(SettingsError, match=f"--listen: {words}"):
        server(*BASE, "--listen", address)
    with pytest.raises(SettingsError, match=f"--http: {words}"):
        server(*BASE, "--http", address, "--insecure")


@pytest.mark.parametrize("address", ["http://host:8470", "host", ":8470", "a b:1", "h:99999", "[h]:1", "1::2::3:4", ""])
def test_other_addresses_that_are_none_are_refused_at_once(address: str) -> None:
    with pytest.raises(SettingsError, match=r"--server: .* is not HOST:PORT"):
        client("--data", "a.jsonl", "--server", address)
    with pytest.raises(SettingsError, match="--server: 'h:0'"):
        client("--data", "a.jsonl", "--server", "h:0")


@pytest.mark.parametrize(
    "address", ["[::1]:8470", "[fe80::1%eth0]:8470", "dns:///fed.example.org:8470", "ipv6:[::1]:1"]
)
def test_addresses_that_grpc_takes_are_taken(address: str) -> None:
    assert client("--data", "a.jsonl", "--server", address).server == address


def test_an_epsilon_becomes_noise_for_all_releases_of_the_run() -> None:
    privacy = ["--selection-clip-norm", "1", "--selection-epsilon", "8"]
    once = server(*BASE, *privacy).run_spec().privacy.selection
    each_round = server(*BASE, *privacy, "--selection-schedule", "per-round").run_spec().privacy.selection
    assert each_round.noise_multiplier == pytest.approx(once.noise_multiplier * 3**0.5, rel=1e-3)


def test_a_site_needs_some_data_and_shards_of_different_names() -> None:
    with pytest.raises(SettingsError, match="--data"):
        client()
    with pytest.raises(SettingsError, match=r"two shards are called a;"):
        client("--data", "x/a.jsonl", "y/a.jsonl")
    with pytest.raises(SettingsError, match="HOST:PORT"):
        client("--data", "a.jsonl", "--server", "host")
    with pytest.raises(SettingsError, match=r"--http: .* --insecure"):
        client("--data", "a.jsonl", "--http", "0.0.0.0:1")
    assert client("--data", "a.jsonl", "--http", "0.0.0.0:1", "--insecure").http == "0.0.0.0:1"
    assert client("--data", "a.jsonl", "b.jsonl").data == (Path("a.jsonl"), Path("b.jsonl"))


def test_the_specification_on_the_wire_has_every_value() -> None:
    # Numbers that a JSON reader could round.
    spec = RunSpec.of(
        model="m",
        rounds=2,
        seed=2**62 + 1,
        lora_targets=("q", "v"),
        selection_clip_norm=2.5,
        selection_noise_multiplier=0.1,
    )
    values = settings.flat(spec)
    assert set(values) == {setting.name for setting in settings.settings_of(RunSpec)} - {
        "beft_targets",
        "byzantine_sites",
        "clipping_iterations",
        "clipping_radius",
        "encoder_hidden_size",
        "ia3_feedforward",
        "ia3_targets",
        "kmeans_iterations",
        "num_virtual_tokens",
        "robust_bucket_size",
        "robust_mixing",
        "server_beta1",
        "server_beta2",
        "server_learning_rate",
        "server_momentum",
        "server_tau",
        "target_queries",
    }
    read = RunSpec.model_validate_json(spec.model_dump_json())
    assert (read, settings.flat(read)) == (spec, values)


def test_help_and_reference_name_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for model in (ServerSettings, ClientSettings):
        with pytest.raises(SystemExit):
            settings.load(model, program="p", description="d", arguments=["--help"], environment={})
        printed = capsys.readouterr().out
        for setting in settings.settings_of(model):
            assert settings.flag(setting.name) in printed
            assert settings.variable(setting.name) in printed
            assert setting.field.description
        assert "Undefined" not in printed


def test_the_configuration_reference_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == configuration(), "run `make docs`"


def test_the_state_folder_in_the_reference_is_no_ones_home() -> None:
    assert str(Path.home()) not in json.dumps(configuration())


@pytest.mark.parametrize(
    ("budget", "pool", "rows"),
    [
        ("auto", 10, None),
        ("7", 10, 7),
        ("70", 10, 10),
        ("1.5%", 200, 3),
        ("1.5%", 201, 4),
        ("100%", 9, 9),
        ("1%", 0, 0),
    ],
)
def test_budgets(budget: str, pool: int, rows: int | None) -> None:
    assert budget_rows(budget, pool) == rows


def test_only_full_and_the_papers_own_rule_have_no_budget() -> None:
    budgets = {
        name: RunSpec.of(model="m", rounds=1, selection_strategy=name).selection.budget_of(1000)
        for name in STRATEGY_SPECS
    }
    assert budgets == {name: None if name in ("full", "fedhds") else 15 for name in STRATEGY_SPECS}


def test_loopback() -> None:
    assert all(settings.is_loopback(host) for host in ("localhost", "127.0.0.1", "127.9.9.9", "[::1]"))
    assert not any(settings.is_loopback(host) for host in ("0.0.0.0", "[::]", "10.0.0.1", "host"))


class Shape(Parameters):
    summary: ClassVar[str]

    kind: str = parameter(..., "What is drawn.", setting="shape")


class Circle(Shape):
    summary = "a circle"
    kind: Literal["circle"] = "circle"
    radius: float = parameter(1.0, "Its radius.", gt=0)
    fill: str = parameter("", "Its color.")


class Square(Shape):
    summary = "a square"
    kind: Literal["square"] = "square"
    side: int = parameter(2, "Its side.", setting="side_length")
    fill: str = parameter("", "Its color.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fill == "plaid":
            raise ValueError("no square is plaid")
        return self


SHAPES: dict[str, type[Shape]] = {"circle": Circle, "square": Square}
VARIANTS = Variants(SHAPES, key="kind", default="circle", kind="shape")


class Paper(Parameters):
    width: int = parameter(..., "Width in cm.", setting="paper_width", ge=1)
    holes: tuple[int, ...] = parameter((), "Where holes are.")


class Drawing(Parameters):
    """A nested model as the daemons have them."""

    paper: Paper = Field(json_schema_extra={"group": "Paper"})
    shape: Annotated[Shape, VARIANTS] = Field(
        default_factory=VARIANTS.make_default, json_schema_extra={"group": "Shape"}
    )
    title: str = parameter("", "Written below.", group="Text")
    revision: int = Field(1, description="For programs.", json_schema_extra={"setting": False})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.title and self.paper.width < len(self.title):
            raise ValueError("paper_width: the title is wider")
        return self


def drawing(*arguments: str, environment: dict[str, str] | None = None) -> Drawing:
    return settings.load(Drawing, program="p", description="d", arguments=arguments, environment=environment or {})


def test_nested_values_have_flat_names(tmp_path: Path) -> None:
    file = tmp_path / "drawing.yaml"
    file.write_text("paper-width: 9\nholes: 1,2\nshape: square\nside_length: 5\n")
    expected = Drawing(paper=Paper(width=9, holes=(1, 2)), shape=Square(side=5))
    assert drawing("--config", str(file)) == expected
    assert drawing("--paper-width", "9", "--holes", "1", "2", "--shape", "square", "--side-length", "5") == expected
    variables = {"PAPER_WIDTH": "9", "HOLES": "1,2", "SHAPE": "square", "SIDE_LENGTH": "5"}
    assert drawing(environment={f"FEDHDS_{name}": value for name, value in variables.items()}) == expected
    assert Drawing.of(paper_width=9, holes=(1, 2), shape="square", side_length=5) == expected


def test_settings_know_their_path_group_and_owners() -> None:
    found = [(each.name, each.path, each.group, each.owners) for each in settings.settings_of(Drawing)]
    assert found == [
        ("paper_width", ("paper", "width"), "Paper", ()),
        ("holes", ("paper", "holes"), "Paper", ()),
        ("shape", ("shape", "kind"), "Shape", ()),
        ("radius", ("shape", "radius"), "Shape", ("circle",)),
        ("fill", ("shape", "fill"), "Shape", ("circle", "square")),
        ("side_length", ("shape", "side"), "Shape", ("square",)),
        ("title", ("title",), "Text", ()),
    ]


@pytest.mark.parametrize(
    ("arguments", "setting", "words"),
    [
        ([], "--paper-width", "is required (or set FEDHDS_PAPER_WIDTH)"),
        (["--paper-width", "0"], "--paper-width", "'0' is not valid"),
        (["--paper-width", "9", "--holes", "1", "x"], "--holes", "'x' is not valid"),
        (["--paper-width", "2", "--title", "long"], "--paper-width", "the title is wider"),
        (["--paper-width", "9", "--side-length", "3"], "--side-length", "the shape circle has no such parameter"),
        (["--paper-width", "9", "--radius", "0"], "--radius", "'0' is not valid"),
        (["--paper-width", "9", "--shape", "square", "--fill", "plaid"], "--shape", "no square is plaid"),
    ],
)
def test_mistakes_in_nested_values_name_the_flag(arguments: list[str], setting: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)) as caught:
        drawing(*arguments)
    assert caught.value.setting == setting


def test_an_unknown_variant_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    words = "FEDHDS_SHAPE: 'star' is not a known shape; choose one of circle, square"
    with pytest.raises(SettingsError, match=words):
        drawing(environment={"FEDHDS_PAPER_WIDTH": "9", "FEDHDS_SHAPE": "star", "FEDHDS_RADIUS": "3"})
    with pytest.raises(SystemExit):
        drawing("--paper-width", "9", "--shape", "star")
    assert re.search(r"--shape: invalid choice: 'star' \(choose from .*circle", capsys.readouterr().err)


def test_an_added_variant_has_its_flags_and_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Star(Shape):
        summary = "a star"
        kind: Literal["star"] = "star"
        # The attribute is another variant's, too; the flag is its own.
        side: int = parameter(5, "Its points.", setting="points", ge=3)

    monkeypatch.setitem(SHAPES, "star", Star)
    arguments = ["--paper-width", "9", "--shape", "star", "--points", "7"]
    found = drawing(*arguments)
    assert found.shape == Star(side=7)
    assert Drawing.model_validate_json(found.model_dump_json()) == found
    for wrong in (["--shape", "square", "--points", "7"], ["--shape", "star", "--side-length", "7"]):
        with pytest.raises(SettingsError, match="has no such parameter"):
            drawing("--paper-width", "9", *wrong)
    with pytest.raises(SettingsError, match="--points: '2'"):
        drawing("--paper-width", "9", "--shape", "star", "--points", "2")
    with pytest.raises(SystemExit):
        drawing("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "star: Its points. (default 5) [FEDHDS_POINTS]" in shown
    assert "circle: a circle; square: a square; star: a star" in shown


def test_the_reference_has_a_table_for_each_group_and_says_whose_a_parameter_is() -> None:
    text = settings.reference(Drawing)
    assert re.findall(r"^### (.*)$", text, re.MULTILINE) == ["Paper", "Shape", "Text"]
    assert "| `--fill` | `FEDHDS_FILL` |  | circle, square: Its color. |" in text
    assert "| `--shape` | `FEDHDS_SHAPE` | `circle` | What is drawn. circle: a circle; square: a square. |" in text
    assert "revision" not in text


@pytest.mark.parametrize(
    "clash",
    [
        {"title": parameter(3, "Of another kind.")},
        {"fill": parameter("", "Its color, in other words.")},
        {"fill": parameter("red", "Its color.")},
        {"color": parameter("", "Its color.", setting="fill")},
        {"angle": parameter(0, "Tilt.", setting="radius")},
    ],
)
def test_two_parameters_never_share_a_name(monkeypatch: pytest.MonkeyPatch, clash: dict[str, Any]) -> None:
    [name] = clash
    annotations = {"kind": Literal["star"], name: str}
    star = type("Star", (Shape,), {"summary": "a star", "kind": "star", "__annotations__": annotations, **clash})
    monkeypatch.setitem(SHAPES, "star", star)
    with pytest.raises(ValueError, match="two parameters never share a name"):
        settings.settings_of(Drawing)
