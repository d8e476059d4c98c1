"""A row to tokens: prompt template, which tokens give loss, what ends an answer, truncation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedhds.errors import ModelError
from fedhds.spec import PromptFormat
from fedhds.tensors.manifest import StopToken
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.chat_template import ChatTemplate
from fedhds_client.data.row_formats import Row
from fedhds_client.data.tokenization import RowTokenizer
from fedhds_client.models.untrained import can_say

logger = logging.getLogger(__name__)

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
_HEADINGS = {"user": "Instruction", "assistant": "Response"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of a row, or of its prompt alone."""

    input_ids: list[int]
    loss: list[bool]
    """For each token whether it is trained: those of all answers, with what ends them."""
    answer_start: int
    """Position where the last answer begins; of a prompt alone, its length."""
    end: int | None
    """Position of the token that ends the last answer; None where it was cut off, or nothing ends an answer."""
    truncated: bool
    targets: list[int] | None = None
    """What is learned in place of `input_ids`, as long as they; None: these themselves."""

    def last_answer(self) -> Encoded:
        """The same with loss on the last answer alone: what an evaluation measures."""
        own = [wanted and place >= self.answer_start for place, wanted in enumerate(self.loss)]
        return replace(self, loss=own)


class Prompter:
    """Renders rows for one tokenizer.

    With a chat template, the tokens are those of the template's rendering of the whole conversation. With Alpaca's
    form, prompt and answer are tokenized apart, so that the boundary is exact, and EOS ends every answer. In both,
    special marks in a row's own text stay text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        prompt_format: PromptFormat = "auto",
        model: Any = None,
    ) -> None:
        """`model`, a causal LM that is to answer, tells which tokens it can say; without it all of them count.

        Says in the log, once, what a chat template does that training cannot follow; raises ModelError.
        """
        template = tokenizer.chat_template
        if prompt_format == "chat" and not template:
            raise ModelError("the tokenizer has no chat template; set --prompt-format alpaca or auto")
        self._tokenizer = tokenizer
        self._chat = ChatTemplate(tokenizer) if template and prompt_format != "alpaca" else None
        self._tokens = self._chat.tokens if self._chat else RowTokenizer(tokenizer)
        self.max_length = max_length
        text = str(template) if self._chat else _ALPACA_WITH_INPUT + _ALPACA
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        """SHA-256 of the template in effect."""
        own = self._chat.end_id if self._chat else None
        self.end_id: int | None = tokenizer.eos_token_id if own is None else own
        """The token that ends an answer: what the chat template puts behind it, else EOS."""
        self._said_id = self.end_id if model is None else self._sayable(model)
        self.stop_ids: tuple[int, ...] = tuple(
            dict.fromkeys(token for token in (self._said_id, self.end_id, tokenizer.eos_token_id) if token is not None)
        )
        """Tokens at which generation stops, the one that training puts behind an answer first."""

    @property
    def stop_tokens(self) -> tuple[StopToken, ...]:
        """The same as a run's manifest has them."""
        return tuple(StopToken.of(token, str(self._tokenizer.convert_ids_to_tokens(token))) for token in self.stop_ids)

    def answer(self, generated: str) -> str:
        """The answer in a generated text: without what the template writes behind it as text."""
        return generated.rstrip().removesuffix(self._chat.tail) if self._chat and self._chat.tail else generated

    def asked(self, turns: Sequence[Mapping[str, str]]) -> str:
        """Turns (role, content) as a text, up to the answer that is asked for, with the marks that are written into it.

        A token that the tokenizer itself puts first is not in it. Raises BadRow.
        """
        messages = (*turns, {"role": "assistant", "content": "Answer."})
        if self._chat:
            rendering = self._chat.render(messages)
            return rendering.text[: rendering.answer_start]
        end = "" if self.end_id is None else str(self._tokenizer.convert_ids_to_tokens(self.end_id))
        texts = self._alpaca(Row(0, "", "", "", messages=messages))[:-1]
        return "".join(text + end if answer else text for text, answer in texts)

    def check(self, row: Row) -> None:
        """Raises BadRow, without any of the row's text, when the row cannot be rendered."""
        # Tokens take five times as long, and can fail on special marks only.
        if self._chat and not row.verbatim:
            marked = self._chat.render(*_conversation(row)).private
        else:
            marked = any(self._tokens.holds_marks(text) for text, _ in self._alpaca(row))
        if marked:
            self._whole(row)

    def other_format(self, row: Row) -> str:
        """The prompt format that takes a row which this one refuses: alpaca, or "" where there is none."""
        try:
            return "alpaca" if self._chat and self._alpaca(row) else ""
        except BadRow:
            return ""

    def encode(self, row: Row) -> Encoded:
        """Prompt and answer in at most max_length tokens; raises BadRow.

        A row that is too long first loses tokens from the middle of what is before its last answer (head and response
        marker stay) down to what the answer leaves, but not below half the length; then the answer's end.
        """
        ids, loss, start, end = self._whole(row)
        room = max(self.max_length - (len(ids) - start), self.max_length // 2)
        kept = _without_middle(start, room)
        gap = len(kept) < start
        shortened = [ids[place] for place in kept] + ids[start:]
        wanted = [loss[place] for place in kept] + loss[start:]
        if gap:
            # What is left of an answer behind the gap has lost its beginning.
            place = room // 2
            while place < len(kept) and wanted[place]:
                wanted[place] = False
                place += 1
        cut = len(shortened) > self.max_length
        targets = None
        if self._said_id is not None and self._said_id != self.end_id:
            targets = [self._said_id if token == self.end_id else token for token in shortened[: self.max_length]]
        if end is not None:
            end += len(kept) - start
            end = end if end < self.max_length else None
        return Encoded(
            shortened[: self.max_length],
            wanted[: self.max_length],
            len(kept),
            end,
            truncated=gap or cut,
            targets=targets,
        )

    def encode_prompt(self, row: Row, reserve: int) -> Encoded:
        """The prompt alone, leaving `reserve` tokens for an answer, but taking at least a quarter of the length."""
        ids = self._prompt(row)
        kept = _without_middle(len(ids), max(self.max_length - reserve, self.max_length // 4))
        return Encoded(
            [ids[place] for place in kept], [False] * len(kept), len(kept), None, truncated=len(kept) < len(ids)
        )

    def _whole(self, row: Row) -> tuple[list[int], list[bool], int, int | None]:
        """Tokens, which of them give loss, the last answer's start, and the place of the token that ends it."""
        ids: list[int]
        loss: list[bool]
        if self._chat and not row.verbatim:
            rendering = self._chat.render(*_conversation(row))
            ids, loss, start = self._tokens.encode(
                rendering.text, rendering.spans, rendering.answer_start, private=rendering.private
            )
            eos = self._tokenizer.eos_token_id
            if self._chat.end_id is None and eos is not None:
                ids, loss = [*ids, eos], [*loss, True]
        else:
            ids, loss, start = [], [], 0
            for text, answer in self._alpaca(row):
                own = self._tokens.ids(text, special=not ids)
                if not ids and own and own[-1] == self._tokenizer.eos_token_id:
                    own = own[:-1]
                if answer:
                    start = len(ids)
                    own = own if self.end_id is None else [*own, self.end_id]
                ids, loss = [*ids, *own], [*loss, *[answer] * len(own)]
        end = next((place for place in reversed(range(start, len(ids))) if ids[place] == self.end_id), None)
        return ids, loss, start, end

    def _sayable(self, model: Any) -> int | None:
        """What the model is to say where an answer ends: the token that ends it, else one that ends texts for it."""
        if self.end_id is None or can_say(model, self.end_id):
            return self.end_id
        name = self._tokenizer.convert_ids_to_tokens
        cause = f"the base model cannot say {name(self.end_id)}, which ends an answer: that token was never trained"
        own = model.config.eos_token_id
        for token in (self._tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])):
            if token is not None and can_say(model, token):
                logger.warning("%s. The model learns to say %s there", cause, name(token))
                return int(token)
        logger.warning("%s, and adapters do not train it. Answers will not end; use another base model", cause)
        return self.end_id

    def _prompt(self, row: Row) -> list[int]:
        if self._chat and not row.verbatim:
            rendering = self._chat.render(*_conversation(row))
            return self._tokens.encode(rendering.text[: rendering.answer_start], private=rendering.private)[0]
        ids, _, start, _ = self._whole(row)
        return ids[:start]

    def _alpaca(self, row: Row) -> list[tuple[str, bool]]:
        """A row's texts in order, each with whether it is an answer."""
        if row.verbatim:
            return [(row.instruction, False), (row.response, True)]
        if not row.messages:
            template = _ALPACA_WITH_INPUT if row.context else _ALPACA
            return [(template.format(instruction=row.instruction, context=row.context), False), (row.response, True)]
        if row.tools or any("tool_calls" in turn for turn in row.messages):
            raise BadRow("Alpaca's prompt format has no place for tools")
        texts: list[tuple[str, bool]] = []
        before = _ALPACA.partition("### ")[0]
        for turn in row.messages:
            heading = f"{before}### {_HEADINGS.get(turn['role'], turn['role'].capitalize())}:\n"
            before = "\n\n"
            if turn["role"] == "assistant":
                texts += [(heading, False), (turn["content"], True)]
            else:
                texts.append((heading + turn["content"], False))
        joined: list[tuple[str, bool]] = []
        for text, answer in texts:
            if joined and not answer and not joined[-1][1]:
                joined[-1] = joined[-1][0] + text, False
            else:
                joined.append((text, answer))
        return joined


def _conversation(row: Row) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    if row.messages:
        return list(row.messages), list(row.tools)
    question = f"{row.instruction}\n\n{row.context}" if row.context else row.instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.response}], []


def _without_middle(length: int, room: int) -> list[int]:
    """Places of `length` tokens that stay when only `room` may: those at both ends."""
    if length <= room:
        return list(range(length))
    head = room // 2
    return [*range(head), *range(length - (room - head), length)]
