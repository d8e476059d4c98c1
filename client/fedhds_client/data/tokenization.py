"""Text to tokens; special marks that stand in a row's own text stay text."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from fedhds.errors import ModelError


class RowTokenizer:
    """Tokenizes what was made of rows by one tokenizer.

    `</s>` in a row's text is not the end of an answer. A template writes such marks, too, so text that holds any comes
    in two forms. `hidden` puts placeholders in their place before a template sees them. `revealed` then gives the
    template's marks private names and puts the row's back, as text. A copy of the tokenizer knows the private names
    alone. Without marks in a row nothing of that happens: the tokenizer itself reads the text as it is.
    """

    def __init__(self, tokenizer: Any, marks: Sequence[str] = ()) -> None:
        """`marks`: what the template writes as one token, besides the tokenizer's special tokens."""
        self._tokenizer = tokenizer
        self._ids = {str(token): index for index, token in tokenizer.added_tokens_decoder.items()}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {str(token) for token in tokenizer.all_special_tokens}
        self._ids |= {mark: tokenizer.convert_tokens_to_ids(mark) for mark in special - self._ids.keys()}
        names = sorted((mark for mark in special | set(marks) if mark.strip()), key=lambda mark: (-len(mark), mark))
        # Nobody can write these into a row.
        draw = f"{secrets.randbelow(10**16):016}"
        self._placeholders = {mark: f"\ue000{draw}{number:04}\ue001" for number, mark in enumerate(names)}
        self._private = {mark: f"\ue002{draw}{number:04}\ue003" for number, mark in enumerate(names)}
        self._texts = {placeholder: mark for mark, placeholder in self._placeholders.items()}
        self._mark = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._placeholder = re.compile(f"\ue000{draw}[0-9]{{4}}\ue001")
        self._private_id = {name: self._ids[mark] for mark, name in self._private.items()}

    def holds_marks(self, value: Any, spared: frozenset[str] = frozenset()) -> bool:
        """Whether a text, or any text in a JSON value, holds a special mark that is not one of `spared`."""
        if isinstance(value, str):
            return any(mark not in spared for mark in self._mark.findall(value))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return any(self.holds_marks(item, spared) for item in items)

    def hidden(self, value: Any, spared: frozenset[str] = frozenset()) -> Any:
        """The same with a placeholder for every such mark; keys of objects stay."""
        if isinstance(value, str):
            return self._mark.sub(lambda match: match[0] if match[0] in spared else self._placeholders[match[0]], value)
        if isinstance(value, dict):
            return {key: self.hidden(item, spared) for key, item in value.items()}
        return [self.hidden(item, spared) for item in value] if isinstance(value, list) else value

    def revealed(self, text: str) -> str:
        """Rendered text in the form that `encode` takes as `private`."""
        renamed = self._mark.sub(lambda match: self._private[match[0]], text)
        return self._placeholder.sub(lambda match: self._texts[match[0]], renamed)

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of a row's own text; with `special` those that the tokenizer adds, too."""
        if self.holds_marks(text):
            return self._private_ids(text, special=special)
        ids: list[int] = self._tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def encode(
        self, text: str, spans: Sequence[tuple[int, int]] = (), start: int = 0, *, private: bool = False
    ) -> tuple[list[int], list[bool], int]:
        """Tokens of a rendered text; for each whether it has a character of one of `spans`, (begin, end); and the
        place of the first one that reaches beyond the character `start`."""
        if not self._tokenizer.is_fast:
            return self._encode_slowly(text, spans, start, private)
        if private:
            encoding = self._twin.encode(text, add_special_tokens=False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            whole = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids, offsets = whole["input_ids"], whole["offset_mapping"]
        mask = [any(end > first and begin < last for first, last in spans) for begin, end in offsets]
        place = next((place for place, (_, end) in enumerate(offsets) if end > start), len(ids))
        return list(ids), mask, place

    def _encode_slowly(
        self, text: str, spans: Sequence[tuple[int, int]], start: int, private: bool
    ) -> tuple[list[int], list[bool], int]:
        """Without offsets: what a beginning of the text has in common with the whole says where it ends."""

        def tokens(part: str) -> list[int]:
            return self._private_ids(part) if private else self._tokenizer(part, add_special_tokens=False)["input_ids"]

        ids = list(tokens(text))

        def place(position: int, *, inclusive: bool = False) -> int:
            part = tokens(text[:position])
            pairs = zip(part, ids, strict=False)
            common = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(part), len(ids)))
            return common + (inclusive and common < len(part))

        mask = [False] * len(ids)
        for first, last in spans:
            begin, end = place(first), min(place(last, inclusive=True), len(ids))
            mask[begin:end] = [True] * (end - begin)
        return ids, mask, place(start)

    def _private_ids(self, text: str, *, special: bool = False) -> list[int]:
        if self._tokenizer.is_fast:
            return list(self._twin.encode(text, add_special_tokens=special).ids)
        ids: list[int] = []
        names = "|".join(map(re.escape, self._private_id)) or "(?!)"
        for piece in re.split(f"({names})", text):
            if piece in self._private_id:
                ids.append(self._private_id[piece])
            elif piece:
                pieces = self._tokenizer.tokenize(piece, split_special_tokens=True)
                ids += self._tokenizer.convert_tokens_to_ids(pieces)
        return list(self._tokenizer.build_inputs_with_special_tokens(ids)) if special else ids

    @cached_property
    def _twin(self) -> Any:
        """The tokenizer under private names of its marks; made when a row first needs it, seconds for a large one."""
        from tokenizers import Tokenizer

        content = json.loads(self._tokenizer.backend_tokenizer.to_str())
        content |= {"truncation": None, "padding": None}
        for token in content["added_tokens"]:
            token["content"] = self._private.get(token["content"], token["content"])
        vocabulary = content["model"].get("vocab")
        if isinstance(vocabulary, dict):
            content["model"]["vocab"] = {self._private.get(name, name): index for name, index in vocabulary.items()}
        elif isinstance(vocabulary, list):
            content["model"]["vocab"] = [[self._private.get(name, name), score] for name, score in vocabulary]
        unknown = content["model"].get("unk_token")
        if isinstance(unknown, str):
            content["model"]["unk_token"] = self._private.get(unknown, unknown)
        twin = Tokenizer.from_str(json.dumps(content))
        if any(twin.token_to_id(name) != index for name, index in self._private_id.items()):
            raise ModelError("the tokenizer cannot tell its special tokens from the same characters in a row's text")
        return twin
