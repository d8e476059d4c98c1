"""Rows that the run's chat template refuses: found before registering, named by file and line, or left out."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedhds.errors import DataError, SettingsError
from fedhds.spec import RunSpec
from fedhds_client.commands.adapter import evaluate
from fedhds_client.computation import Cancelled, Control
from fedhds_client.data.judging import judge
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.executor import TaskExecutor
from fedhds_client.settings import ClientSettings
from fedhds_client.site import open_sites
from tests.support.templates import STRICT, set_template, talk
from tests.support.tiny import make_model

CANARY = "canary"
GOOD = talk("user", "assistant")
OPERATOR = "the operator of the coordinator"
CURE = f"{OPERATOR} can set --prompt-format alpaca, which takes it"


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    """Of a tokenizer whose template takes turns only in the order user, assistant."""
    tokenizer: Any = AutoTokenizer.from_pretrained(make_model(tmp_path_factory.mktemp("model")))
    tokenizer.chat_template = STRICT
    return Prompter(tokenizer, max_length=256)


def judged(shard: Shard, prompter: Prompter, *, skip: bool = False) -> None:
    judge(shard, prompter, skip_bad_rows=skip, operator=OPERATOR, control=Control())


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        # As of public reports: system-row, two-users, assistant-first.
        ("system user assistant", "no system role"),
        ("user user assistant", "roles must alternate"),
        ("assistant user assistant", "roles must alternate"),
        # Of our own.
        ("user assistant system user assistant", "no system role"),
        ("user assistant assistant", "roles must alternate"),
        ("user assistant tool assistant", "roles must alternate"),
        ("developer user assistant", "roles must alternate"),
    ],
)
def test_a_row_that_the_template_refuses_is_a_bad_row_with_file_and_line(
    tmp_path: Path, prompter: Prompter, roles: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad = talk(*roles.split(), words=CANARY)
    path = written(tmp_path / "private.jsonl", GOOD, "", bad, talk("user", "assistant", "user", "assistant"))
    with Shard.open(path) as shard, pytest.raises(DataError) as caught:
        judged(shard, prompter)
    assert caught.value.line == 3
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: the model's chat template refuses its turns (")
    assert f'"{reason}"; fix the row, or leave such rows out with --skip-bad-rows; {CURE}' in message
    public = caught.value.public_message
    assert public.startswith("line 3 of its data cannot be used: the model's chat template refuses its turns")
    assert CURE in public
    for text in (message, public):
        assert CANARY not in text
    assert "private" not in public
    with Shard.open(path, skip_bad_rows=True) as shard, caplog.at_level(logging.WARNING):
        judged(shard, prompter, skip=True)
        assert [(row.id, row.response) for row in shard] == [(0, "assistant 1"), (1, "assistant 3")]
        assert shard.skipped == 1
        kept = written(tmp_path / "kept.jsonl", GOOD, talk("user", "assistant", "user", "assistant"))
        with Shard.open(kept) as other:
            judged(other, prompter)
            assert other.digest == shard.digest
            assert len(other) == 2
    (line,) = caplog.messages
    assert line.startswith(f"{path}: 1 of 3 rows are left out (line 3: the model's chat template refuses its turns")
    assert CANARY not in line


def test_the_number_of_rows_that_are_refused_is_said(tmp_path: Path, prompter: Prompter) -> None:
    path = written(tmp_path / "rows.jsonl", GOOD, *[talk("system", "user", "assistant")] * 30)
    with Shard.open(path) as shard, pytest.raises(DataError, match=r"line 2: .*\(with 29 more rows\); fix the row"):
        judged(shard, prompter)


@pytest.mark.parametrize("skip", [True, False])
def test_a_shard_of_which_no_row_remains_is_an_error(tmp_path: Path, prompter: Prompter, skip: bool) -> None:
    path = written(tmp_path / "rows.jsonl", *[talk("user", "user", "assistant")] * 3)
    with Shard.open(path, skip_bad_rows=skip) as shard, pytest.raises(DataError) as caught:
        judged(shard, prompter, skip=skip)
    assert f"{path}: none of its rows can be used with this prompt format; line 1: the model's chat" in str(
        caught.value
    )
    assert CURE in caught.value.public_message
    assert "skip-bad-rows" not in str(caught.value)


def test_no_prompt_format_is_named_that_does_not_take_the_row(tmp_path: Path, prompter: Prompter) -> None:
    # A row with tools, of which Alpaca's form knows nothing.
    row = json.loads(talk("system", "user", "assistant")) | {"tools": [{"type": "function", "function": {"name": "f"}}]}
    path = written(tmp_path / "rows.jsonl", GOOD, json.dumps(row))
    with Shard.open(path) as shard, pytest.raises(DataError) as caught:
        judged(shard, prompter)
    assert "--prompt-format" not in str(caught.value)
    assert "--prompt-format" not in caught.value.public_message


def test_plain_rows_and_whole_prompts_pass(tmp_path: Path, prompter: Prompter) -> None:
    rows = [{"instruction": "a </s>", "response": "b <s>"}, {"prompt": "a", "completion": "b"}]
    with Shard.open(written(tmp_path / "rows.jsonl", *map(json.dumps, rows))) as shard:
        digest = shard.digest
        judged(shard, prompter)
        assert (len(shard), shard.digest, shard.skipped) == (2, digest, 0)


def test_a_site_that_stops_does_not_go_on_judging(tmp_path: Path, prompter: Prompter) -> None:
    control = Control()
    control.cancel()
    with Shard.open(written(tmp_path / "rows.jsonl", GOOD)) as shard, pytest.raises(Cancelled):
        judge(shard, prompter, skip_bad_rows=True, operator=OPERATOR, control=control)


def test_a_site_judges_training_rows_and_held_out_rows_and_counts_again_what_remains(
    tmp_path: Path, prompter: Prompter
) -> None:
    bad = talk("system", "user", "assistant")
    data = written(tmp_path / "rows.jsonl", *[GOOD] * 3, bad)
    held_out = written(tmp_path / "unseen.jsonl", *[GOOD] * 4, bad)
    for least in (4, 5):
        settings = ClientSettings(
            data=(data,),
            eval_data=held_out,
            skip_bad_rows=True,
            min_cluster_rows=least,
            name=("a",),
            state=tmp_path / "state",
            out=tmp_path / "out",
        )
        with ExitStack() as stack:
            (site,) = open_sites(settings, None, stack)
            unknown: Any = None
            executor = TaskExecutor(settings, [site], unknown)
            models: Any = SimpleNamespace(prompter=prompter, spec=RunSpec.of(model="m", rounds=1))
            executor._models = models
            if least == 5:
                with pytest.raises(SettingsError, match="--eval-data: has 4 rows"):
                    executor.judge(site, "run", Control())
            else:
                assert executor.judge(site, "run", Control()) == 3
            assert (site.rows, site.held_out and len(site.held_out)) == (3, 4)


def test_an_evaluation_by_hand_judges_the_same_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(set_template(make_model(tmp_path / "model"), STRICT))
    data = written(tmp_path / "rows.jsonl", GOOD, talk("system", "user", "assistant"))
    with pytest.raises(DataError, match=r"line 2: .* you can set --prompt-format alpaca, which takes it"):
        evaluate(model=model, data=data, device="cpu")
    for flags in ({"skip_bad_rows": True}, {"prompt_format": "alpaca"}):
        options: Any = flags
        evaluate(model=model, data=data, device="cpu", max_new_tokens=1, json=True, **options)
        assert json.loads(capsys.readouterr().out)["base"]["rows"] == (1 if "skip_bad_rows" in flags else 2)
