"""Chat templates of a model's folder: those that take all time or memory are told before any row is rendered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedhds.errors import ModelError
from fedhds_client.models.template_trial import try_template

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def tokenizer(template: object) -> SimpleNamespace:
    return SimpleNamespace(chat_template=template, special_tokens_map={"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            id="time",
            marks=pytest.mark.slow,
        ),
        "{% generation %}{% endgeneration %}{% for m in messages %}{{ 'x' * 10 ** 11 }}{% endfor %}",
        "{{ 'x' * 10 ** 7 }}",
        {"default": CHATML, "tool_use": "{{ 'x' * 10 ** 7 }}"},
    ],
    ids=[None, "memory", "text", "second"],
)
def test_a_template_that_takes_too_much_is_refused(
    template: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="the chat template of m does not render a short conversation within 10 s"):
        try_template("m", tokenizer(template), tmp_path)
    assert not (tmp_path / "templates").exists()


def test_other_templates_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try_template("m", tokenizer(None), tmp_path)
    # What it raises is told when rows are rendered, by what it is about.
    refusing = "{{ raise_exception('roles must alternate') }}"
    for template in (CHATML, refusing):
        try_template("m", tokenizer(template), tmp_path)
    monkeypatch.setattr("subprocess.run", None)
    for template in (CHATML, refusing):
        try_template("m", tokenizer(template), tmp_path)
