"""A conversation with the tuned model: its turns, what of them fits the context, and an answer token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from fedhds.errors import UsageError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.probing import without_own_generation

Turn = dict[str, str]


class Conversation:
    """Questions and answers so far; every answer is asked for with all of them, as training saw conversations."""

    def __init__(
        self,
        model: InferenceModel,
        prompter: Prompter,
        *,
        stop_ids: Sequence[int],
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
    ) -> None:
        """`stop_ids` end an answer, besides what ends one for `prompter`. A temperature of 0 takes the likeliest token.

        Raises UsageError for a system message that the prompt format has no place for.
        """
        self._model, self._prompter = model, prompter
        self._first: list[Turn] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Turn] = []
        self._ends = sorted({*stop_ids, *prompter.stop_ids})
        self._max_new_tokens, self._temperature = max_new_tokens, temperature
        self.left_out = 0
        """Turns, the oldest, that the last question left out of the prompt as the context was full."""
        self.cut = False
        """Whether the last question alone was too long, and lost its middle."""
        if system:
            try:
                prompter.asked([*self._first, {"role": "user", "content": "Why?"}])
            except BadRow as error:
                raise UsageError(f"--system: {error}; leave it out") from error

    def answer(self, question: str, show: Callable[[str], None]) -> None:
        """Answers, telling `show` each piece of text as it comes.

        What was shown until an interruption counts as the answer. Raises UsageError when the prompt format refuses
        the question.
        """
        self._turns.append({"role": "user", "content": question})
        try:
            prompt = self._prompt()
        except BadRow as error:
            self._turns.pop()
            raise UsageError(str(error)) from error
        streamer = _Pieces(self._model.tokenizer, show)
        try:
            self._generate(prompt.input_ids, streamer)
        finally:
            # No turn without its answer: templates insist on taking turns.
            text = self._prompter.answer(streamer.text)
            self._turns.append({"role": "assistant", "content": text or "..."})

    def _prompt(self) -> Encoded:
        """The prompt for the last question, without the oldest turns that do not fit."""
        for start in range(0, len(self._turns), 2):
            turns = [*self._first, *self._turns[start:], {"role": "assistant", "content": "..."}]
            row = Row(0, "", "", "...", messages=tuple(turns))
            prompt = self._prompter.encode_prompt(row, reserve=self._max_new_tokens)
            self.left_out, self.cut = start, prompt.truncated
            if not prompt.truncated:
                break
        return prompt

    def _generate(self, prompt: list[int], streamer: BaseStreamer) -> None:
        model = self._model
        ids = torch.tensor([prompt], device=model.device)
        sampled = {"temperature": self._temperature, "top_k": 0} if self._temperature else {}
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=min(self._max_new_tokens, model.max_length - len(prompt)),
            do_sample=bool(sampled),
            num_beams=1,
            pad_token_id=int(model.tokenizer.pad_token_id),
            eos_token_id=self._ends,
            **sampled,
        )
        with without_own_generation(model.base.model), torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=streamer
            )


class _Pieces(BaseStreamer):
    """Tells text as soon as later tokens cannot change it any more."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self.text = ""
        """What was told."""

    def put(self, value: Any) -> None:
        """The prompt first, then token after token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._decoded()
        # A character may take several tokens; until then it is this mark.
        if not text.endswith("\ufffd"):
            self._tell(text)

    def end(self) -> None:
        """The answer is over."""
        self._tell(self._decoded())

    def _decoded(self) -> str:
        return str(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self._show(piece)
