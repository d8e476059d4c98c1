"""Prompts: the templates to the letter, the exact start of the response, its end, and what a long row loses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from fedhds.errors import ModelError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.row_formats import Row
from tests.support.shared import shared
from tests.support.tiny import make_model

BOS, EOS = 1, 2
LONG = 10_000
# The form of ChatML, in the special tokens that the tiny tokenizer has.
CHAT = (
    "{% for turn in messages %}<s>{{ turn['role'] }}\n{{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ROW = Row(0, "Name a cat.", "Tom is a cat.", "It is Tom.")
BARE = Row(0, "Name a cat.", "", "It is Tom.")
TALK = Row(
    0,
    "",
    "",
    "Rex.",
    messages=tuple(
        {"role": role, "content": text}
        for role, text in (
            ("system", "Be brief."),
            ("user", "A cat?"),
            ("assistant", "Tom."),
            ("user", "And a dog?"),
            ("assistant", "Rex."),
        )
    ),
)
VERBATIM = Row(0, "Q: a cat?\nA:", "", " Tom", verbatim=True)
ALPACA_ROW = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\nName a cat.\n\n### Input:\nTom is a cat."
    "\n\n### Response:\n"
)
ALPACA_BARE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a cat.\n\n### Response:\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer: outside special tokens, one token is one byte."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def byte_level(folder: Path) -> Any:
    """A tokenizer that no test changes."""
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    """The same with a chat template."""
    tokenizer.chat_template = CHAT
    return tokenizer


def _texts(tokenizer: Any, encoded: Encoded) -> tuple[str, str]:
    """Prompt and response as the model sees them."""
    start = encoded.answer_start
    return tokenizer.decode(encoded.input_ids[:start]), tokenizer.decode(encoded.input_ids[start:])


def _whole(tokenizer: Any, row: Row, **options: Any) -> tuple[str, str]:
    encoded = Prompter(tokenizer, max_length=LONG, **options).encode(row)
    assert not encoded.truncated
    return _texts(tokenizer, encoded)


# Templates.


@pytest.mark.parametrize("prompt_format", ["auto", "alpaca"])
@pytest.mark.parametrize(("row", "prompt"), [(ROW, ALPACA_ROW), (BARE, ALPACA_BARE)])
def test_alpacas_template_has_a_form_with_input_and_one_without(
    tokenizer: Any, prompt_format: str, row: Row, prompt: str
) -> None:
    assert _whole(tokenizer, row, prompt_format=prompt_format) == (prompt, "It is Tom.</s>")


@pytest.mark.parametrize("prompt_format", ["auto", "chat"])
def test_a_chat_template_is_used_where_there_is_one(chatting: Any, prompt_format: str) -> None:
    prompt, response = _whole(chatting, ROW, prompt_format=prompt_format)
    assert prompt == "<s>user\nName a cat.\n\nTom is a cat.</s><s>assistant\n"
    assert response == "It is Tom.</s>"
    assert _whole(chatting, BARE, prompt_format=prompt_format)[0] == "<s>user\nName a cat.</s><s>assistant\n"


def test_alpacas_template_can_be_had_in_spite_of_a_chat_template(chatting: Any) -> None:
    assert _whole(chatting, ROW, prompt_format="alpaca") == (ALPACA_ROW, "It is Tom.</s>")


def test_a_chat_format_without_a_chat_template_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no chat template; set --prompt-format alpaca or auto"):
        Prompter(tokenizer, max_length=LONG, prompt_format="chat")


def test_earlier_turns_come_before_the_question(chatting: Any) -> None:
    prompt, response = _whole(chatting, TALK)
    assert prompt == (
        "<s>system\nBe brief.</s><s>user\nA cat?</s><s>assistant\nTom.</s><s>user\nAnd a dog?</s><s>assistant\n"
    )
    assert response == "Rex.</s>"
    prompt, response = _whole(chatting, TALK, prompt_format="alpaca")
    assert prompt == (
        ALPACA_BARE.partition("###")[0]
        + "### System:\nBe brief.\n\n### Instruction:\nA cat?\n\n### Response:\nTom.</s>"
        "\n\n### Instruction:\nAnd a dog?\n\n### Response:\n"
    )
    assert response == "Rex.</s>"


@pytest.mark.parametrize("prompt_format", ["auto", "chat", "alpaca"])
def test_a_verbatim_prompt_goes_in_without_a_template(chatting: Any, prompt_format: str) -> None:
    assert _whole(chatting, VERBATIM, prompt_format=prompt_format) == ("Q: a cat?\nA:", " Tom</s>")


def test_braces_and_template_marks_in_a_row_are_text(chatting: Any) -> None:
    marks = "{context} {0} {{ 7 * 7 }} {% raise %} %s {"
    row = Row(0, marks, marks, marks)
    for prompt_format in ("chat", "alpaca"):
        prompt, response = _whole(chatting, row, prompt_format=prompt_format)
        assert prompt.count(marks) == 2
        assert response == marks + "</s>"


# The response's start and end.


def test_the_response_is_its_own_tokens_and_the_end_and_nothing_else(chatting: Any) -> None:
    for prompt_format in ("chat", "alpaca"):
        for row in (ROW, BARE, TALK, VERBATIM):
            encoded = Prompter(chatting, max_length=LONG, prompt_format=prompt_format).encode(row)
            own = chatting(row.response, add_special_tokens=False)["input_ids"]
            assert encoded.input_ids[encoded.answer_start :] == [*own, EOS]


def test_what_the_chat_template_puts_behind_an_answer_belongs_to_the_response(chatting: Any) -> None:
    chatting.chat_template = CHAT.replace("</s>", "</s>\n")
    prompt, response = _whole(chatting, BARE)
    assert prompt == "<s>user\nName a cat.</s>\n<s>assistant\n"
    assert response == "It is Tom.</s>\n"


def test_a_thought_that_only_the_question_opens_is_not_trained_and_the_log_says_so(
    chatting: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # As reasoning models have it: the open tag is in the prompt, but not in a conversation that was answered.
    chatting.chat_template = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    prompt, response = _whole(chatting, BARE)
    assert prompt == "<s>user\nName a cat.</s><s>assistant\n"
    assert response == "It is Tom.</s>"
    (message,) = caplog.messages
    assert "asks for an answer with '<think>', which it does not write before a given answer" in message


def test_a_template_that_refuses_a_rows_turns_makes_it_a_bad_row_without_the_rows_text(chatting: Any) -> None:
    chatting.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no ' + messages[0]['content']) }}{% endif %}"
        + CHAT
    )
    prompter = Prompter(chatting, max_length=LONG)
    assert _texts(chatting, prompter.encode(BARE))[1] == "It is Tom.</s>"
    for judged in (prompter.check, prompter.encode):
        with pytest.raises(BadRow, match="refuses its turns") as caught:
            judged(TALK)
        assert "Be brief" not in str(caught.value)
    assert "(system, user, assistant, user, assistant)" in str(caught.value)


def _with_special_tokens(tokenizer: Any, template: str) -> Any:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer


@pytest.mark.parametrize(("template", "first"), [("<s> $A", BOS), ("<s> $A </s>", BOS), ("$A </s>", None)])
@pytest.mark.parametrize("row", [ROW, VERBATIM])
def test_the_tokenizers_own_special_tokens_stand_at_the_front_alone(
    tokenizer: Any, template: str, first: int | None, row: Row
) -> None:
    prompter = Prompter(_with_special_tokens(tokenizer, template), max_length=LONG)
    encoded = prompter.encode(row)
    assert [token for token in encoded.input_ids if token in (BOS, EOS)] == ([BOS] if first else []) + [EOS]
    assert (encoded.input_ids[0] == BOS) is (first is not None)
    assert encoded.input_ids[-1] == EOS
    assert prompter.encode_prompt(row, 0).input_ids == encoded.input_ids[: encoded.answer_start]


def test_a_chat_template_writes_its_own_special_tokens(chatting: Any) -> None:
    prompter = Prompter(_with_special_tokens(chatting, "<s> $A </s>"), max_length=LONG)
    ids = prompter.encode(BARE).input_ids
    assert ids[0] == BOS != ids[1]
    assert ids[-1] == EOS != ids[-2]
    assert (ids.count(BOS), ids.count(EOS)) == (2, 2)


def test_a_verbatim_prompt_gets_the_tokenizers_special_tokens_also_beside_a_chat_template(chatting: Any) -> None:
    prompter = Prompter(_with_special_tokens(chatting, "<s> $A </s>"), max_length=LONG)
    encoded = prompter.encode(VERBATIM)
    assert _texts(chatting, encoded) == ("<s>Q: a cat?\nA:", " Tom</s>")


def test_a_tokenizer_without_eos_leaves_the_response_as_it_is(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    assert _whole(tokenizer, ROW) == (ALPACA_ROW, "It is Tom.")


def test_asking_and_training_share_the_prompt(chatting: Any) -> None:
    for prompt_format in ("chat", "alpaca"):
        prompter = Prompter(chatting, max_length=LONG, prompt_format=prompt_format)
        for row in (ROW, BARE, TALK, VERBATIM):
            trained, asked = prompter.encode(row), prompter.encode_prompt(row, 64)
            start = trained.answer_start
            assert asked == Encoded(trained.input_ids[:start], [False] * start, start, None, truncated=False)


# Rows that are too long.

# Instructions of digits and responses of letters: what is left of either shows in the text.
DIGITS = "".join(f"{number:04d}" for number in range(100))
LETTERS = "".join(chr(ord("a") + number % 26) for number in range(400))


def _sized(prompt: int, response: int) -> Row:
    """A verbatim row of so many prompt tokens and, with EOS, response tokens."""
    return Row(0, DIGITS[:prompt], "", LETTERS[: response - 1], verbatim=True)


@pytest.mark.parametrize(
    ("prompt", "response", "prompt_left", "response_left"),
    [
        (60, 40, 60, 40),
        (99, 1, 99, 1),
        (61, 40, 60, 40),
        (300, 40, 60, 40),
        (300, 2, 98, 2),
        (300, 50, 50, 50),
        (300, 51, 50, 50),
        (300, 300, 50, 50),
        (50, 300, 50, 50),
        (20, 300, 20, 80),
        (51, 51, 50, 50),
    ],
)
def test_a_long_row_loses_the_middle_of_its_prompt_and_then_the_responses_end(
    tokenizer: Any, prompt: int, response: int, prompt_left: int, response_left: int
) -> None:
    row = _sized(prompt, response)
    encoded = Prompter(tokenizer, max_length=100).encode(row)
    head, tail = prompt_left // 2, prompt_left - prompt_left // 2
    text, answer = _texts(tokenizer, encoded)
    if prompt_left == prompt:
        assert text == row.instruction
    else:
        assert text == row.instruction[:head] + row.instruction[-tail:]
    assert answer == (row.response + "</s>" if response_left == response else row.response[:response_left])
    assert encoded.truncated is (prompt + response > 100)


@given(st.integers(1, 400), st.integers(2, 400), st.integers(2, 300))
def test_no_row_is_longer_than_the_longest_and_a_cut_is_always_told(
    byte_level: Any, prompt: int, response: int, max_length: int
) -> None:
    row = _sized(prompt, response)
    encoded = Prompter(byte_level, max_length=max_length).encode(row)
    assert len(encoded.input_ids) == min(max_length, prompt + response)
    assert encoded.truncated is (prompt + response > max_length)
    ids = byte_level(row.response + "</s>", add_special_tokens=False)["input_ids"]
    kept = encoded.input_ids[encoded.answer_start :]
    assert kept == ids[: len(kept)]
    assert len(kept) >= min(response, max_length - max_length // 2)
    assert (EOS in kept) is (len(kept) == response)


def test_a_long_alpaca_prompt_keeps_its_head_and_the_response_marker(tokenizer: Any) -> None:
    row = Row(0, "Summarize.", "word " * 500, "Words.")
    text, answer = _texts(tokenizer, Prompter(tokenizer, max_length=512).encode(row))
    assert text.startswith("Below is an instruction")
    assert text.endswith("word \n\n### Response:\n")
    assert answer == "Words.</s>"


@pytest.mark.parametrize(
    ("prompt", "reserve", "left"),
    [(60, 40, 60), (61, 40, 60), (300, 40, 60), (300, 90, 25), (300, 999, 25), (25, 99, 25)],
)
def test_a_prompt_leaves_room_for_the_answer_but_keeps_a_quarter(
    tokenizer: Any, prompt: int, reserve: int, left: int
) -> None:
    row = _sized(prompt, 10)
    encoded = Prompter(tokenizer, max_length=100).encode_prompt(row, reserve)
    head, tail = left // 2, left - left // 2
    expected = row.instruction if left == prompt else row.instruction[:head] + row.instruction[-tail:]
    assert tokenizer.decode(encoded.input_ids) == expected
    assert encoded.answer_start == left
    assert encoded.truncated is (left < prompt)


# Which template.


def test_the_fingerprint_is_that_of_the_template_in_effect(folder: Path) -> None:
    plain, chatting, other = (AutoTokenizer.from_pretrained(folder) for _ in range(3))
    chatting.chat_template = CHAT
    other.chat_template = CHAT + " "
    alpaca = {
        Prompter(plain, max_length=10).fingerprint,
        Prompter(plain, max_length=99, prompt_format="alpaca").fingerprint,
        Prompter(chatting, max_length=10, prompt_format="alpaca").fingerprint,
    }
    assert len(alpaca) == 1
    assert Prompter(chatting, max_length=10).fingerprint == hashlib.sha256(CHAT.encode()).hexdigest()
    assert Prompter(chatting, max_length=9, prompt_format="chat").fingerprint not in alpaca
    assert Prompter(other, max_length=10).fingerprint != Prompter(chatting, max_length=10).fingerprint


def test_the_shared_models_prompts_decode_to_the_template() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(shared("models/nano-llama"))
    encoded = Prompter(tokenizer, max_length=LONG, prompt_format="alpaca").encode(ROW)
    start = encoded.answer_start
    assert tokenizer.decode(encoded.input_ids[:start], skip_special_tokens=True) == ALPACA_ROW
    assert tokenizer.decode(encoded.input_ids[start:], skip_special_tokens=True) == ROW.response
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
