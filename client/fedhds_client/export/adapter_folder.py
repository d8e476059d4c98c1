"""The PEFT folder that a run leaves, read without torch: its configuration, what it belongs to, what ends an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from fedhds.errors import UsageError
from fedhds.spec import PromptFormat

CONFIG, TENSORS, GENERATION, CARD = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "generation_config.json",
    "README.md",
)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder with an adapter, and `adapter_config.json` as PEFT wrote it."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> AdapterFolder:
        """Raises UsageError for a folder without an adapter."""
        missing = [name for name in (CONFIG, TENSORS) if not (path / name).is_file()]
        if missing:
            raise UsageError(f"--adapter: {path} is no adapter folder, it lacks {' and '.join(missing)}")
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            config = None
        if not isinstance(config, dict):
            # Copying needs no more than the files; what needs the content says what it lacks.
            config = {}
        return cls(path, config)

    @property
    def files(self) -> list[Path]:
        """What belongs to the adapter, of all that is in the folder."""
        return [self.path / name for name in (CONFIG, TENSORS, GENERATION, CARD) if (self.path / name).is_file()]

    @property
    def kind(self) -> str:
        """PEFT's name of the method, as LORA; empty if the configuration has none."""
        return str(self.config.get("peft_type") or "")

    def base_model(self, given: str | None) -> str:
        """The base model: `given`, else what the adapter names. Raises UsageError when neither says it."""
        name = given or self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise UsageError(f"--adapter: {self.path} does not say which base model it is for; name it with --model")
        return name

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, the trained one first; none without a file. Raises UsageError for a bad file."""
        file = self.path / GENERATION
        if not file.exists():
            return []
        try:
            own = json.loads(file.read_text(encoding="utf-8"))["eos_token_id"]
            return [int(token) for token in (own if isinstance(own, list) else [own])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"--adapter: {file} does not say what ends an answer; write it again or remove it"
            ) from error

    def prompt_format(self) -> PromptFormat:
        """How the run made prompts of rows, as its model card says; auto where there is no card of fedhds."""
        try:
            text = (self.path / CARD).read_text(encoding="utf-8")
            front = yaml.safe_load(text.split("---", 2)[1])
            value = front["prompt_format"]
        except (OSError, ValueError, IndexError, KeyError, TypeError, yaml.YAMLError):
            return "auto"
        return value if value in get_args(PromptFormat) else "auto"
