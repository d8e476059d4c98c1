"""A chat template is a program that comes with a model: it is tried out in a process that can be ended.

`python -m fedhds_client.models.template_trial` is that process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from fedhds.errors import ModelError
from fedhds.runtime.files import replace_file

# Of the processor, for a few short conversations; a template needs a thousandth of it.
_CPU_S = 10
_MEMORY_BYTES = 4 << 30
_MAX_CHARACTERS = 1 << 20
# However busy the machine is: the process imports transformers first.
_PATIENCE_S = 600.0
_TOO_LONG = 3
_TURNS = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the word?"},
    {"role": "assistant", "content": "Sun."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Moon."},
)
_CONVERSATIONS = (_TURNS[1:2], _TURNS[1:3], _TURNS[1:], _TURNS[:2], _TURNS)


def try_template(name: str, tokenizer: Any, cache_dir: Path | None = None) -> None:
    """Raises ModelError for a chat template that takes far more time, memory or text than short conversations need.

    `name` is the model's; `cache_dir` remembers templates that were tried. What a template does with certain words
    only is not found out.
    """
    template = tokenizer.chat_template
    if not template:
        return
    text = json.dumps({"template": template, "special": {**tokenizer.special_tokens_map}}, default=str)
    known = cache_dir / "templates" / hashlib.sha256(text.encode()).hexdigest() if cache_dir else None
    if known and known.exists():
        return
    command = [sys.executable, "-m", __name__]
    try:
        status = subprocess.run(command, input=text.encode(), capture_output=True, timeout=_PATIENCE_S).returncode
    except subprocess.TimeoutExpired:
        status = _TOO_LONG
    if status:
        raise ModelError(
            f"the chat template of {name} does not render a short conversation within {_CPU_S} s, "
            f"{_MEMORY_BYTES >> 30} GiB and {_MAX_CHARACTERS} characters; use another copy of the model, or "
            "--prompt-format alpaca"
        )
    if known:
        replace_file(known, "", shared=True)


def main() -> int:
    """Renders with what standard input has; the exit status is 0 unless a limit was met."""
    from transformers.utils.chat_template_utils import render_jinja_template

    content = json.load(sys.stdin)
    templates = content["template"]
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    imports_s = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    resource.setrlimit(resource.RLIMIT_CPU, (imports_s + _CPU_S, hard))
    with contextlib.suppress(ValueError, OSError):
        # Not every system knows it.
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        for conversation in _CONVERSATIONS:
            for prompted in (False, True):
                try:
                    texts = render_jinja_template(
                        conversations=[list(conversation)],
                        chat_template=template,
                        add_generation_prompt=prompted,
                        **content["special"],
                    )[0]
                except MemoryError:
                    return _TOO_LONG
                except Exception:  # noqa: BLE001 - what a template does not take is told when rows are rendered
                    continue
                if len(texts[0]) > _MAX_CHARACTERS:
                    return _TOO_LONG
    return 0


if __name__ == "__main__":
    sys.exit(main())
