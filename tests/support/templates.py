"""Chat templates with one property each that templates of real models have."""

from __future__ import annotations

import json
from pathlib import Path

CHAT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# Knows no system role, and turns only in the order user, assistant, user, ...
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% endfor %}" + CHAT
)


def set_template(model: Path, template: str) -> Path:
    """Gives the tokenizer in a model folder a chat template."""
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model


def talk(*roles: str, words: str = "") -> str:
    """A line of a chat whose turns have `roles`."""
    turns = [{"role": role, "content": f"{words}{role} {number}"} for number, role in enumerate(roles)]
    return json.dumps({"messages": turns})
