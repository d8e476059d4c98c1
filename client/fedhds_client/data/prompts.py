"""A row to tokens: prompt template, exact boundary between prompt and response, truncation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from fedhds.errors import ModelError
from fedhds.spec import PromptFormat
from fedhds_client.data.row_formats import Row

# Taori et al. 2023, Stanford Alpaca; the form in which FedIT and FedHDS tune.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}"
    "\n\n### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a row; those before `response_start` are the prompt and give no loss."""

    input_ids: list[int]
    response_start: int
    truncated: bool


class Prompter:
    """Renders rows for one tokenizer.

    Prompt and response are tokenized apart, so that the boundary is exact; the response ends with EOS, or with what
    the chat template puts behind an answer.
    """

    def __init__(self, tokenizer: Any, *, max_length: int, prompt_format: PromptFormat = "auto") -> None:
        template = tokenizer.chat_template
        if prompt_format == "chat" and not template:
            raise ModelError("the tokenizer has no chat template; set --prompt-format alpaca or auto")
        self._tokenizer = tokenizer
        self._chat = bool(template) and prompt_format != "alpaca"
        self.max_length = max_length
        text = str(template) if self._chat else _ALPACA_WITH_INPUT + _ALPACA
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        """SHA-256 of the template in effect."""

    def encode(self, row: Row) -> Encoded:
        """Prompt and response in at most max_length tokens.

        A row that is too long first loses tokens from the middle of its prompt (its head and the response marker
        stay) down to what the response leaves, but not below half the length; then the response's end.
        """
        prompt, response = self._texts(row)
        prompt_ids, response_ids = self._prompt_ids(row, prompt), self._ids(response)
        room = max(self.max_length - len(response_ids), self.max_length // 2)
        shortened = _without_middle(prompt_ids, room)
        ids = (shortened + response_ids)[: self.max_length]
        return Encoded(ids, len(shortened), len(ids) < len(prompt_ids) + len(response_ids))

    def encode_prompt(self, row: Row, reserve: int) -> Encoded:
        """The prompt alone, leaving `reserve` tokens for an answer, but taking at least a quarter of the length."""
        prompt, _ = self._texts(row)
        ids = self._prompt_ids(row, prompt)
        shortened = _without_middle(ids, max(self.max_length - reserve, self.max_length // 4))
        return Encoded(shortened, len(shortened), len(shortened) < len(ids))

    def _texts(self, row: Row) -> tuple[str, str]:
        end = self._tokenizer.eos_token or ""
        if row.verbatim:
            return row.instruction, row.response + end
        if not self._chat:
            earlier = "".join(f"{role.capitalize()}: {text}\n" for role, text in row.history)
            template = _ALPACA_WITH_INPUT if row.context else _ALPACA
            return template.format(instruction=earlier + row.instruction, context=row.context), row.response + end
        question = f"{row.instruction}\n\n{row.context}" if row.context else row.instruction
        turns = [{"role": role, "content": text} for role, text in row.history]
        turns.append({"role": "user", "content": question})
        prompt = self._rendered(turns, prompted=True)
        whole = self._rendered([*turns, {"role": "assistant", "content": row.response}], prompted=False)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        # Templates that rewrite earlier turns once an answer follows (they drop or add reasoning tags) break the
        # prefix: then the answer goes behind the prompt that the model will be asked with.
        return prompt, row.response + end

    def _rendered(self, turns: list[dict[str, str]], *, prompted: bool) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompted))
        except Exception as error:
            # Templates are programs; they raise what they like for roles and orders that they do not support.
            raise ModelError(
                f"the tokenizer's chat template does not take a row's turns ({type(error).__name__}); set "
                "--prompt-format alpaca"
            ) from error

    def _prompt_ids(self, row: Row, text: str) -> list[int]:
        # A chat template writes its own BOS; elsewhere the tokenizer adds what it is set to add, at the front only.
        special = not self._chat or row.verbatim
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        if special and ids and ids[-1] == self._tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _without_middle(ids: list[int], room: int) -> list[int]:
    if len(ids) <= room:
        return ids
    head = room // 2
    return ids[:head] + ids[len(ids) - (room - head) :]
