"""Chat templates: the tokens are the template's own, answers give loss with what ends them, marks in rows stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from fedhds.errors import ModelError
from fedhds_client.data.bad_row import BadRow
from fedhds_client.data.prompts import Encoded, Prompter
from fedhds_client.data.row_formats import Row, normalized
from fedhds_client.data.shard import Shard
from tests.support.shared import shared

LONG = 10_000
# After public models, shortened: what matters here is as they have it. {% generation %} is put around what the
# assistant says, so that transformers itself can tell which tokens those are.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if role == 'model' %}"
    "{% generation %}{{ m['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}{% else %}"
    "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# A thought stays in the last answer alone; there, an answer without one gets an empty one.
QWEN_3 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set thought = '' %}{% set said = m['content'] %}"
    "{% if '</think>' in said %}{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Another token behind the last answer than behind earlier ones.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>\n' }}{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-3": (LLAMA_3, "<|eot|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen-3": (QWEN_3, "<|im_end|>"),
    "phi-3": (PHI_3, "<|end|>"),
}
MARKS = sorted(set(re.findall(r"<[|a-z_]+>", CHATML + LLAMA_3 + GEMMA)) | {"<|end|>", "<|user|>", "<|assistant|>"})
THINK = ["<think>", "</think>"]


def _dressed(backend: Any) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.add_tokens(THINK)
    return tokenizer


def byte_level() -> Any:
    """As GPT-2, Llama 3 and Qwen have it, with merges that cross what templates put beside contents."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "t"), ("<", "/"), ("</", "s"), ("</s", ">"), (">", "Ċ"), ("h", "e"), ("Ġ", "<")]
    names = ["<pad>", "<s>", "</s>", "<unk>", *alphabet, *("".join(pair) for pair in merges if pair != ("</s", ">"))]
    merges.remove(("</s", ">"))
    backend = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _dressed(backend)


def metaspace(scheme: Any) -> Any:
    """As Llama 2 and Mistral have it: a space before the first word, bytes for what is unknown."""
    letters = [chr(code) for code in range(33, 127)]
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "▁a", "▁b"]
    merges = [("▁", "a"), ("▁", "b")]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _dressed(backend)


def unigram() -> Any:
    """As T5 and Gemma's ancestors have it: the marks are pieces of its own vocabulary."""
    pieces = [("<pad>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    backend = Tokenizer(models.Unigram([*pieces, ("▁a", -2.5)], unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace()
    return _dressed(backend)


def slow() -> Any:
    """A tokenizer in Python, without offsets."""
    tokenizer = ByT5Tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": MARKS})
    tokenizer.add_tokens(THINK)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "metaspace-first": lambda: metaspace("first"),
    "metaspace-always": lambda: metaspace("always"),
    "prepend": lambda: metaspace("normalizer"),
    "unigram": unigram,
    "slow": slow,
}
FEW = settings(max_examples=10, deadline=None)


@cache
def _tokenizer(name: str, template: str, *, tags: bool = False) -> Any:
    """No test changes one."""
    tokenizer = TOKENIZERS[name]()
    tokenizer.chat_template = template if tags else re.sub(r"\{% (end)?generation %\}", "", template)
    return tokenizer


@cache
def _prompter(name: str, template: str, *, tags: bool = False) -> Prompter:
    return Prompter(_tokenizer(name, template, tags=tags), max_length=LONG)


def _talk(*turns: tuple[str, str]) -> Row:
    return Row.from_content(0, normalized({"messages": [{"role": role, "content": text} for role, text in turns]}))


def _trained(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Each run of tokens that gives loss, as text."""
    runs: list[list[int]] = []
    for place, (token, wanted) in enumerate(zip(encoded.input_ids, encoded.loss, strict=True)):
        if wanted and (not place or not encoded.loss[place - 1]):
            runs.append([])
        if wanted:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


SAID = st.text(st.sampled_from("ab <>/s|\nthe:é🐈"), min_size=1, max_size=12).filter(lambda text: bool(text.strip()))
TALKS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3)


# The template's own rendering.


@pytest.mark.parametrize(
    ("template", "name"),
    [
        *((template, "byte-level") for template in TEMPLATES),
        *(("llama-3", name) for name in TOKENIZERS if name != "byte-level"),
        *(("gemma", "metaspace-first"), ("phi-3", "slow"), ("qwen-3", "unigram")),
    ],
)
@FEW
@given(talk=TALKS)
def test_the_tokens_are_the_templates_own_and_the_answers_are_those_that_its_tags_mark(
    name: str, template: str, talk: list[tuple[str, str]]
) -> None:
    text, end = TEMPLATES[template]
    turns = [turn for question, answer in talk for turn in (("user", question), ("assistant", answer))]
    row = _talk(*turns)
    tokenizer = _tokenizer(name, text, tags=True)
    assume(not any(mark in said for _, said in turns for mark in (*tokenizer.all_special_tokens, *THINK)))
    encoded = _prompter(name, text).encode(row)
    own: Any = tokenizer.apply_chat_template(
        list(row.messages),
        return_dict=True,
        return_assistant_tokens_mask=tokenizer.is_fast,
    )
    assert encoded.input_ids == own["input_ids"]
    assert not encoded.truncated
    assert encoded.end is not None
    assert encoded.input_ids[encoded.end] == tokenizer.convert_tokens_to_ids(end)
    assert encoded.loss[encoded.end]
    tagged = _prompter(name, text, tags=True).encode(row)
    # The tokens of a template that marks its answers, and of the same one without marks, give the same loss.
    assert (tagged.input_ids, tagged.loss, tagged.answer_start) == (
        encoded.input_ids,
        encoded.loss,
        encoded.answer_start,
    )
    if tokenizer.is_fast:
        whole = tokenizer.apply_chat_template(list(row.messages), tokenize=False)
        offsets = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for place, (wanted, theirs) in enumerate(zip(encoded.loss, own["assistant_masks"], strict=True)):
            # Of several tokens that share the last character, transformers takes the first one alone.
            assert wanted == bool(theirs) or (encoded.loss[place - 1] and offsets[place][0] == offsets[place - 1][0])


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_evaluation_asks_with_what_stands_before_the_answer_in_training(template: str) -> None:
    tokenizer = _tokenizer("byte-level", TEMPLATES[template][0])
    prompter = Prompter(tokenizer, max_length=LONG)
    row = _talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    asked, whole = prompter.encode_prompt(row, 8).input_ids, prompter.encode(row)
    assert tokenizer.decode(whole.input_ids[: whole.answer_start]) == tokenizer.decode(asked)
    assert asked == tokenizer.apply_chat_template(
        list(row.messages[:-1]), add_generation_prompt=True, return_dict=False
    )
    last = whole.last_answer()
    assert [place for place, wanted in enumerate(last.loss) if wanted] == list(
        range(whole.answer_start, len(whole.input_ids))
    )


# What ends an answer.


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_end_of_a_turn_stops_generation_besides_eos(template: str) -> None:
    text, end = TEMPLATES[template]
    tokenizer = _tokenizer("byte-level", text)
    prompter = Prompter(tokenizer, max_length=LONG)
    names = tokenizer.convert_ids_to_tokens(list(prompter.stop_ids))
    assert names == list(dict.fromkeys([end, "</s>"]))
    assert [token.text for token in prompter.stop_tokens] == names


@pytest.mark.parametrize(
    "template",
    [
        # Nothing, a line break, and a mark that is many tokens.
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + ('' if loop.last else '\n') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[END]' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
    ],
)
@pytest.mark.parametrize("name", ["byte-level", "slow"])
def test_eos_is_trained_where_a_template_has_no_token_that_ends_an_answer(
    template: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = _tokenizer(name, template)
    prompter = Prompter(tokenizer, max_length=LONG)
    (message,) = caplog.messages
    assert "ends an answer with no token of its own; </s> is trained behind the last answer" in message
    row = _talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    encoded = prompter.encode(row)
    own = tokenizer.apply_chat_template(list(row.messages), return_dict=False)
    assert encoded.input_ids == [*own, tokenizer.eos_token_id]
    assert encoded.end == len(own)
    assert prompter.stop_ids == (tokenizer.eos_token_id,)
    first, last = _trained(tokenizer, encoded)
    # What is generated as text is no part of the answer.
    assert prompter.answer(tokenizer.decode(encoded.input_ids[encoded.answer_start : -1])).strip() == "d"
    assert first.startswith("b")
    assert last.startswith("d")
    assert last.endswith("</s>")


def test_tags_that_leave_the_end_of_a_turn_out_are_completed() -> None:
    tagged = CHATML.replace(
        "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}<|im_end|>\n"
    )
    tokenizer = _tokenizer("byte-level", tagged, tags=True)
    row = _talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    encoded = Prompter(tokenizer, max_length=LONG).encode(row)
    assert _trained(tokenizer, encoded) == ["b<|im_end|>", "d<|im_end|>"]


def test_what_a_template_does_that_training_cannot_follow_is_said_when_it_is_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    opened = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}")
    tokenizer = _tokenizer("byte-level", opened)
    prompter = Prompter(tokenizer, max_length=LONG)
    (message,) = caplog.messages
    assert r"asks for an answer with '<think>\n', which it does not write before a given answer" in message
    row = _talk(("user", "a"), ("assistant", "b"))
    assert _trained(tokenizer, prompter.encode(row)) == ["b<|im_end|>\n"]
    assert tokenizer.decode(prompter.encode_prompt(row, 8).input_ids).endswith("<|im_start|>assistant\n")
    assert len(caplog.messages) == 1
    # A thought that the generation prompt opens and that the rendering closes can be followed.
    closed = QWEN_3.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>\n' }}{% endif %}")
    tokenizer = _tokenizer("byte-level", closed)
    encoded = Prompter(tokenizer, max_length=LONG).encode(row)
    (trained,) = _trained(tokenizer, encoded)
    assert trained.lstrip("\n") == "</think>\n\nb<|im_end|>\n"
    assert len(caplog.messages) == 1


def test_a_thought_has_its_tags_once_and_earlier_ones_go_as_the_template_has_it() -> None:
    tokenizer = _tokenizer("byte-level", QWEN_3)
    thinking = "<think>\nhm\n</think>\n\nb"
    row = _talk(("user", "a"), ("assistant", thinking), ("user", "c"), ("assistant", thinking))
    encoded = Prompter(tokenizer, max_length=LONG).encode(row)
    assert encoded.input_ids == tokenizer.apply_chat_template(list(row.messages), return_dict=False)
    assert _trained(tokenizer, encoded) == ["b<|im_end|>\n", "<think>\nhm\n</think>\n\nb<|im_end|>\n"]
    opens, closes = tokenizer.convert_tokens_to_ids(THINK)
    assert (encoded.input_ids.count(opens), encoded.input_ids.count(closes)) == (1, 1)


# Marks in a row's own text.


@pytest.mark.parametrize(
    ("template", "name"),
    [*(("chatml", name) for name in TOKENIZERS), *((name, "byte-level") for name in ("llama-3", "mistral", "phi-3"))],
)
@FEW
@given(
    before=st.text(st.sampled_from("ab <\n"), max_size=3),
    mark=st.sampled_from(["</s>", "<s>", "<|im_end|>", "<|eot|>", "<|end|>"]),
    after=st.text(st.sampled_from("ab >\n"), max_size=3),
)
def test_special_marks_in_a_row_stay_text(name: str, template: str, before: str, mark: str, after: str) -> None:
    text, _ = TEMPLATES[template]
    tokenizer = _tokenizer(name, text)
    said = f"a{before}{mark}{after}b"
    prompter = _prompter(name, text)
    encoded = prompter.encode(_talk(("user", said), ("assistant", said), ("user", "a"), ("assistant", said)))
    plain = prompter.encode(_talk(("user", "aab"), ("assistant", "aab"), ("user", "a"), ("assistant", "aab")))
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    marks = [[token for token in row.input_ids if token in special] for row in (encoded, plain)]
    assert marks[0] == marks[1]
    first, last = _trained(tokenizer, encoded)
    # In T5's vocabulary a line break is unknown.
    if name != "unigram" or "\n" not in said:
        assert mark in first
        assert mark in last
    row = _talk(("user", said), ("assistant", "b"))
    again, asked = prompter.encode(row), prompter.encode_prompt(row, 8)
    assert tokenizer.decode(again.input_ids[: again.answer_start]) == tokenizer.decode(asked.input_ids)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "slow"])
@FEW
@given(talk=TALKS)
def test_a_row_with_marks_is_tokenized_like_any_other_apart_from_them(name: str, talk: list[tuple[str, str]]) -> None:
    prompter = _prompter(name, LLAMA_3)
    tokens = prompter._tokens
    turns = [turn for question, answer in talk for turn in (("user", question), ("assistant", answer))]
    text = prompter._tokenizer.apply_chat_template(
        [{"role": role, "content": said} for role, said in turns], tokenize=False
    )
    assume(not any(tokens.holds_marks(said) for _, said in turns))
    assert tokens.encode(tokens.revealed(text), private=True)[0] == tokens.encode(text)[0]


def test_marks_stay_text_in_alpacas_format_and_bos_comes_once() -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("models/nano-llama"))
    prompter = Prompter(tokenizer, max_length=LONG, prompt_format="alpaca")
    for row in (
        Row(0, "What is <s>?", "</s>", "It is </s>, not <s>."),
        Row(0, "<s>Question </s>", "", "</s> Answer", verbatim=True),
        _talk(("system", "</s>"), ("user", "<s>"), ("assistant", "</s>")),
    ):
        encoded = prompter.encode(row)
        marks = [token for token in encoded.input_ids if token in tokenizer.all_special_ids]
        bos = tokenizer("a")["input_ids"][:1]
        assert marks == [token for token in bos if token in tokenizer.all_special_ids] + [tokenizer.eos_token_id]
        assert encoded.end == len(encoded.input_ids) - 1
        assert "</s>" in _trained(tokenizer, encoded)[-1].removesuffix("</s>")


def test_a_tools_description_can_hold_marks_too() -> None:
    tokenizer = _tokenizer("byte-level", "{{ tools | tojson if tools else '' }}" + CHATML)
    tools = [{"type": "function", "function": {"name": "f", "description": "ends at <|im_end|>"}}]
    row = Row.from_content(
        0, normalized({"messages": list(_talk(("user", "a"), ("assistant", "b")).messages), "tools": tools})
    )
    encoded = Prompter(tokenizer, max_length=LONG).encode(row)
    text = tokenizer.decode(encoded.input_ids)
    assert json.loads(text.partition("<|im_start|>")[0]) == tools
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


# Forms of templates and rows.


def test_content_is_given_in_parts_to_a_template_that_wants_parts() -> None:
    parts = CHATML.replace("m['content'] +", "(m['content'] | map(attribute='text') | join('')) +")
    tokenizer = _tokenizer("byte-level", parts)
    encoded = Prompter(tokenizer, max_length=LONG).encode(_talk(("user", "a"), ("assistant", "b")))
    assert tokenizer.decode(encoded.input_ids) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "hello", "{% for m in messages %}{{ m.role }}{% endfor %}"]
)
def test_a_template_that_renders_no_plain_conversation_is_a_model_error(template: str) -> None:
    with pytest.raises(ModelError, match="does not render a question and its answer; set --prompt-format alpaca"):
        Prompter(_tokenizer("byte-level", template), max_length=LONG)


def test_a_row_that_the_template_refuses_is_a_bad_row_in_the_templates_words() -> None:
    prompter = Prompter(_tokenizer("byte-level", GEMMA), max_length=LONG)
    with pytest.raises(BadRow, match=r'turns \(system, user, assistant\): "System role not supported"'):
        prompter.check(_talk(("system", "a"), ("user", "b"), ("assistant", "c")))
    prompter.check(_talk(("user", "b"), ("assistant", "c")))
    silent = "{% for m in messages %}{% if loop.index < 3 %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    prompter = Prompter(_tokenizer("byte-level", silent), max_length=LONG)
    with pytest.raises(BadRow, match="leaves its last answer out"):
        prompter.check(_talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))


def test_tools_have_no_place_in_alpacas_format() -> None:
    prompter = Prompter(_tokenizer("byte-level", CHATML), max_length=LONG, prompt_format="alpaca")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = Row.from_content(0, normalized({"messages": [{"role": "user", "content": "a"}, call]}))
    with pytest.raises(BadRow, match="no place for tools"):
        prompter.check(row)


def test_calls_of_tools_are_trained_and_what_tools_answer_is_not() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] or '' }}"
        "{% for call in m['tool_calls'] or [] %}{{ '[' + call['function']['name'] + ']' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = _tokenizer("byte-level", template)
    messages = [
        {"role": "user", "content": "rain?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
        {"role": "tool", "content": "wet"},
        {"role": "assistant", "content": "yes"},
    ]
    encoded = Prompter(tokenizer, max_length=LONG).encode(Row.from_content(0, normalized({"messages": messages})))
    assert _trained(tokenizer, encoded) == ["[weather]<|im_end|>\n", "yes<|im_end|>\n"]


def test_a_long_conversation_keeps_its_head_and_its_end_and_what_is_left_of_a_cut_answer_gives_no_loss() -> None:
    tokenizer = _tokenizer("byte-level", CHATML)
    row = _talk(("user", "a"), ("assistant", "b" * 100), ("user", "c"), ("assistant", "d"))
    encoded = Prompter(tokenizer, max_length=60).encode(row)
    assert len(encoded.input_ids) == 60
    assert encoded.truncated
    first, last = _trained(tokenizer, encoded)
    assert set(first) == {"b"}
    assert last == "d<|im_end|>\n"
    text = tokenizer.decode(encoded.input_ids)
    assert text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb")
    assert text.count("b") > len(first)


# The shared cases.


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the shared cases."""
    import runpy

    out = tmp_path_factory.mktemp("models")
    module = runpy.run_path(str(shared("cases") / "make_models.py"))
    chat = ["<|im_start|>", "<|im_end|>"]
    module["variant"](out / "chatml", module["CHATML"], chat)
    module["variant"](out / "chatml-eos", module["CHATML"], chat, "<|im_end|>")
    module["variant"](out / "think", module["THINK"], [*chat, *THINK])
    return out


@pytest.mark.parametrize("model", ["chatml", "chatml-eos", "think"])
@pytest.mark.parametrize("case", ["rows8.jsonl", "think.jsonl", "multi.jsonl", "tool-role.jsonl", "union.jsonl"])
def test_the_shared_cases_are_trained_as_their_templates_render_them(cases: Path, model: str, case: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(cases / model)
    prompter = Prompter(tokenizer, max_length=LONG)
    end = "</s>" if model == "think" else "<|im_end|>"
    with Shard.open(shared("cases") / case) as shard:
        for row in shard:
            encoded = prompter.encode(row)
            messages: Any = list(row.messages) or [
                {"role": "user", "content": "\n\n".join(filter(None, (row.instruction, row.context)))},
                {"role": "assistant", "content": row.response},
            ]
            assert encoded.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)
            answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
            if model == "think":
                answers = [answer.split("</think>")[-1] for answer in answers]
            assert [text.strip() for text in _trained(tokenizer, encoded)] == [
                f"{text.strip()}{end}" for text in answers
            ]
            assert encoded.end is not None
            assert tokenizer.convert_ids_to_tokens(encoded.input_ids[encoded.end]) == end
