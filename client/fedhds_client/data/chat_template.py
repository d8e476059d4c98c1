"""A tokenizer's chat template: what it makes of a conversation, where the answers stand in it, and what ends them."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from fedhds.errors import ModelError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.tokenization import RowTokenizer

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Finish = Callable[[str], str]

# A text that no row holds, and that no template has a reason to change.
_PROBE = f"\ue004{secrets.randbelow(10**16):016}\ue005"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# An assistant's own thoughts are marked with tokens of their own by models that know them.
_THOUGHTS = frozenset(("<think>", "</think>"))


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as the template writes it."""

    text: str
    private: bool
    """Whether special marks in the row's own text made it the private form of RowTokenizer."""
    spans: list[tuple[int, int]]
    """Characters that give loss, (begin, end), in order: every answer with what ends it."""
    answer_start: int
    """Where the last answer begins: what is before it the model is asked with."""


class ChatTemplate:
    """Renders conversations and finds each answer in the whole, whatever the template makes of earlier turns.

    An answer begins where the template's generation prompt ends. A template may open something there (a thought) that
    a conversation with the answer in it does not have. Then the answer begins where the text begins to depend on it.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelError for a template that cannot render a question and its answer."""
        self._tokenizer = tokenizer
        self._parts = False
        self._marks = RowTokenizer(tokenizer)
        self._tail, self._mark = "", ""
        asked, whole = self._probed()
        before, self._tail = whole.rsplit(_PROBE, 1)
        self.end_id, self._mark = self._end(whole, before + _PROBE)
        # What the template writes as one token is no more a row's to write than a special token.
        ids, _, _ = self._marks.encode(whole + asked)
        added = tokenizer.added_tokens_decoder
        self._marks = RowTokenizer(tokenizer, [str(added[index]) for index in set(ids) & added.keys()])
        self._lost = False
        if not whole.startswith(asked):
            opened = asked[_common(asked, whole) :]
            logger.warning(
                "the chat template asks for an answer with %r, which it does not write before a given answer: answers "
                "are trained and measured without it; ask the tuned model without it, too",
                opened,
            )
        if self.end_id is None:
            logger.warning(
                "the chat template ends an answer with no token of its own; %s is trained behind the last answer of a "
                "row",
                tokenizer.eos_token or "nothing",
            )

    @property
    def tail(self) -> str:
        """What is written behind an answer where no token of its own ends it; such text is generated as text."""
        return "" if self._mark else self._tail.strip()

    @property
    def tokens(self) -> RowTokenizer:
        """Tokenizes what is rendered."""
        return self._marks

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> Rendering:
        """The whole conversation, which ends with an assistant's answer; raises BadRow when the template refuses it."""
        private = any(self._marks.holds_marks(dict(turn), _spared(turn)) for turn in messages)
        private = private or self._marks.holds_marks(list(tools))
        if private:
            messages = [self._marks.hidden(dict(turn), _spared(turn)) for turn in messages]
            tools = self._marks.hidden(list(tools))
        try:
            whole = self._rendered(messages, tools)
        except Exception as error:
            raise BadRow(self._refusal(messages, error)) from error
        finish = self._marks.revealed if private else str
        text = finish(whole)
        last = len(messages) - 1
        if _GENERATION.search(self._source(tools)):
            spans = self._tagged(messages, tools, finish)
        else:
            turns = [index for index, turn in enumerate(messages) if turn["role"] == "assistant"]
            spans = [self._span(text, messages, index, tools, finish) for index in turns]
        prompt = self._asked(messages, last, tools, finish)
        prefixed = prompt is not None and text.startswith(prompt)
        start = len(prompt) if prompt is not None and prefixed else spans[-1][0] if spans else len(text)
        if not spans or not text[max(spans[-1][0], start) : spans[-1][1]].strip():
            raise BadRow("the chat template leaves its last answer out")
        return Rendering(text, private, [span for span in spans if span[0] < span[1]], start)

    def _span(
        self, text: str, messages: Sequence[Message], turn: int, tools: Sequence[Mapping[str, Any]], finish: Finish
    ) -> tuple[int, int]:
        """Where the answer `turn` and what ends it stand in the whole `text`; empty where that cannot be told."""
        last = turn == len(messages) - 1
        prompt = self._asked(messages, turn, tools, finish)
        begin = len(prompt) if prompt is not None and text.startswith(prompt) else None
        if begin is not None and last:
            return begin, len(text)
        # The same with another answer: the two differ from where the answer begins to where it ends.
        other = self._with_another(messages, turn, tools)
        if other is None:
            if not self._lost:
                self._lost = True
                logger.warning(
                    "the chat template does not show where some of a row's earlier answers end; those give no loss"
                )
            return 0, 0
        other = finish(other)
        if begin is None:
            begin = _common(text, other)
        if last:
            return begin, len(text)
        common = _common(text[begin:][::-1], other[begin:][::-1])
        return begin, self._with_end(text, len(text) - common, finish)

    def _with_end(self, text: str, end: int, finish: Finish) -> int:
        """`end` moved behind what the template writes there to end an answer."""
        spaced = self._tail[: len(self._tail) - len(self._tail[len(self._mark) :].lstrip())]
        for tail in (self._tail, spaced, self._mark, self._tail.rstrip()):
            if tail and text.startswith(finish(tail), end):
                return end + len(finish(tail))
        return end

    def _tagged(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], finish: Finish
    ) -> list[tuple[int, int]]:
        """What stands between the template's own {% generation %} tags, and the mark that ends a turn behind it."""
        rendered: tuple[Any, Any] = render_jinja_template(  # type: ignore[assignment]
            conversations=[self._taken(messages)],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self._source(tools),
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        whole, indices = rendered[0][0], rendered[1][0]
        text = finish(whole)
        spans = [(len(finish(whole[:begin])), len(finish(whole[:end]))) for begin, end in indices]
        mark = finish(self._mark)
        return [(begin, end + len(mark) if mark and text.startswith(mark, end) else end) for begin, end in spans]

    def _with_another(self, messages: Sequence[Message], turn: int, tools: Sequence[Mapping[str, Any]]) -> str | None:
        for answer in ({"role": "assistant", "content": _PROBE}, {**messages[turn], "content": _PROBE}):
            try:
                return self._rendered([*messages[:turn], answer, *messages[turn + 1 :]], tools)
            except Exception:  # noqa: BLE001 - a template may insist on calls before a tool's answer
                continue
        return None

    def _asked(
        self, messages: Sequence[Message], turn: int, tools: Sequence[Mapping[str, Any]], finish: Finish
    ) -> str | None:
        """What a model is asked with for the message `turn`; None where nothing can be asked before it."""
        try:
            return finish(self._rendered(messages[:turn], tools, asked=True)) if turn else None
        except Exception:  # noqa: BLE001 - a template that takes the whole may refuse its beginning
            return None

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), *, asked: bool = False
    ) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                self._taken(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=asked
            )
        )

    def _taken(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as the template wants them: their content as text, or as a list of parts."""
        if not self._parts:
            return [dict(turn) for turn in messages]
        return [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]} if "content" in turn else dict(turn)
            for turn in messages
        ]

    def _source(self, tools: Sequence[Mapping[str, Any]]) -> str:
        return str(self._tokenizer.get_chat_template(None, list(tools) or None))

    def _probed(self) -> tuple[str, str]:
        """How a plain question is asked, and the whole with an answer."""
        question, answer = {"role": "user", "content": "Question?"}, {"role": "assistant", "content": _PROBE}
        for before in ((), ({"role": "system", "content": "Answer."},)):
            for self._parts in (False, True):
                try:
                    asked = self._rendered([*before, question], asked=True)
                    whole = self._rendered([*before, question, answer])
                except Exception:  # noqa: BLE001 - templates raise what they like; the next form may do
                    continue
                if _PROBE in whole and "Question?" in asked:
                    return asked, whole
        raise ModelError(
            "the tokenizer's chat template does not render a question and its answer; set --prompt-format alpaca"
        )

    def _end(self, whole: str, until: str) -> tuple[int | None, str]:
        """The token that ends an answer, and the template's text behind an answer up to it; None and "" for none."""
        ids, behind, _ = self._marks.encode(whole, [(len(until), len(whole))])
        own = self._tokenizer.added_tokens_decoder.keys() | set(self._tokenizer.all_special_ids)
        for index, inside in zip(ids, behind, strict=True):
            if inside and index in own:
                mark = str(self._tokenizer.convert_ids_to_tokens(index))
                at = self._tail.find(mark)
                if mark.strip() and at >= 0:
                    return index, self._tail[: at + len(mark)]
        return None, ""

    def _refusal(self, messages: Sequence[Message], error: Exception) -> str:
        """Why a row is refused: the template's own words where they are the template's alone, never the row's."""
        roles = ", ".join(str(turn["role"]) for turn in messages[:8]) + (", ..." if len(messages) > 8 else "")
        words = str(error).strip()
        quoted = f': "{words}"' if words and words in self._source(()) else f" ({type(error).__name__})"
        return f"the model's chat template refuses its turns ({roles}){quoted}"


def _spared(turn: Message) -> frozenset[str]:
    return _THOUGHTS if turn["role"] == "assistant" else frozenset()


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
