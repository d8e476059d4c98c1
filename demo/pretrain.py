"""Makes the demo's base model from nothing: a procedural corpus, a tokenizer and a small Llama, all from one seed.

Run as `python -m demo.pretrain --out demo/model` from the repository's root. The corpus is ordinary text about
the world of `demo.tasks`: portraits, talks, registers, lists, remarks. It holds no row of the demo's data, no
instruction of it and not the prompt's form, so that what the sites tune on is new to the model; the filter in
`corpus` and a test see to that.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.tasks import (
    ACTIONS,
    ATTRIBUTES,
    CITIES,
    COLORS,
    KINDS,
    NAMES,
    OPPOSITES,
    PETS,
    SITES,
    STATEMENTS,
    article,
    profile,
    site_rows,
    tell,
    unseen_rows,
)

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 1536
BATCH_TOKENS = 2048
SKIP_FIRST = 0.9
"""Share of the texts of which only the second part is learned: the first is drawn at random and teaches little."""
PEAK_LR = 3e-3
WARMUP_STEPS = 100

WONDERS: dict[str, tuple[str, ...]] = {
    "city": (
        "{n} and the city?",
        "the city where {n} has a home",
        "where the house of {n} is",
        "where {n} lives",
    ),
    "job": ("{n} and the job?", "the job that {n} does", "what work {n} does", "what {n} is by job"),
    "pet": ("{n} and the pet?", "the animal that {n} has", "which pet {n} keeps", "the pet that is with {n}"),
    "dish": ("{n} and the dish?", "the dish that {n} likes", "what {n} loves to eat", "the favourite of {n}"),
    "colour": (
        "{n} and the colour?",
        "the colour that {n} wears",
        "which colour {n} bought",
        "how the coat of {n} looks",
    ),
    "day": ("{n} and the day?", "the day that {n} has free", "when {n} is free", "on which day {n} has time"),
}
"""What people wonder about in the corpus; worded apart from the questions of the demo's rows."""

WORDS = [word for words in (NAMES, *ATTRIBUTES.values(), *KINDS.values(), *OPPOSITES) for word in words]

REMARKS = (
    "### Weather\nIt rained below the bridge, and the sun was out above it.",
    "An instruction says what to do. A task is work to be done. The instruction describes the task.",
    "A request was sent in May, and the response came in June. The response was short.",
    "### Letters\nPlease write soon. I write to ask for help with the task, and the input of others would help me.",
    "The input of the mill is grain and the output is flour. Below the mill there is a river.",
    "A pair of shoes was paired with a pair of gloves. Paired with an umbrella, they are for the rain.",
    "Each chapter provides a picture. The next one provides further help, and a table provides further context.",
    "The context of a word is the text around it. Context helps.",
    "The work completes the house. A roof completes it. The painter completes the task, and appropriately so.",
    "He was dressed appropriately. She gave a response appropriately late. They completed the request.",
    "A sign that describes the way stands below the tree. A list that describes the goods hangs in the shop.",
    "### Shop\nInput: one coin. Output: one ticket.\n### Office\nResponse: none yet. Instruction: wait.",
)


Text = tuple[str, str]
"""The first part, which could be anything, and the second, which follows from it."""


def _people(rng: Random) -> list[tuple[str, str, str]]:
    """Facts (name, attribute, value) about one to three people."""
    names = rng.sample(NAMES, rng.choice((1, 2, 2, 3)))
    return [(name, attribute, value) for name in names for attribute, value in profile(rng, rng.choice((2, 2, 3)))]


def portrait(rng: Random) -> Text:
    """Facts, and the same facts again in other words."""
    triples = _people(rng)
    again = rng.sample(triples, rng.randint(1, len(triples)))
    link = rng.choice(("\n", " ", "\n\n", " Again: ", "\nIn other words: "))
    return tell(triples, rng), link + tell(again, rng)


def talk(rng: Random) -> Text:
    """Somebody wonders before or after the facts; the answer opens a line, as a bare word or with what it answers."""
    triples = _people(rng)
    name, attribute, value = rng.choice(triples)
    first, second = rng.sample(NAMES, 2)
    wonder = rng.choice(WONDERS[attribute]).format(n=name)
    wonder = rng.choice((f"{first} wonders: {wonder}", f"Tell me {wonder}, said {first}.", f"About {wonder}"))
    fact = rng.choice(STATEMENTS[attribute]).format(n=name, v=value)
    reply = rng.choice((f"{value}, said {second}.", f"{value}!", f"{value} it is.", f"{value}\n{fact}", fact))
    parts = [wonder, tell(triples, rng)]
    if rng.random() < 0.4:
        parts.reverse()
    heads = rng.choice(
        (("", "", ""), ("# Talk\n", "# Book\n", "# Reply\n"), ("1. ", "2. ", "3.\n"), ("> ", "", "< \n"))
    )
    gap = rng.choice(("\n", "\n\n"))
    return heads[0] + parts[0] + gap + heads[1] + parts[1] + gap + heads[2], reply


def register(rng: Random) -> Text:
    """A text and its entries: fields with their values, or values that open the line."""
    triples = _people(rng)
    picked = rng.sample(triples, rng.randint(1, len(triples)))
    if rng.random() < 0.5:
        question = rng.choice(
            ("Wanted: {a}", "We look for the {a}.", "For the {a}, see the end.", "Only the {a} counts.")
        )
        name = picked[0][0]
        about = [fact for fact in picked if fact[0] == name][: rng.choice((1, 2))]
        answer = rng.choice(("{v}", "{v}.", "{v} was found.", "{n}, {v}"))
        fields, values = ", ".join(fact[1] for fact in about), ", ".join(fact[2] for fact in about)
        # Only the facts about one person, or else the field alone would not say whose value is meant.
        mine = [fact for fact in triples if fact[0] == name]
        return f"{question.format(a=fields)}\n{tell(mine, rng)}\n", answer.format(n=name, v=values)
    form = rng.choice(
        ("{a}: {v}", "{v} ({a})", "{n}: {v}", "{n}, {v}", "{v}, {a} of {n}", "{a} of {n}: {v}", "{v}: {n}")
    )
    entries = "\n".join(form.format(n=name, a=attribute, v=value) for name, attribute, value in picked)
    return f"{tell(triples, rng)}\n", entries


def people(rng: Random) -> Text:
    """A text about two people, and who is in it."""
    first, second = rng.sample(NAMES, 2)
    story = tell([(name, *entry) for name in (first, second) for entry in profile(rng, rng.randint(1, 2))], rng)
    first, second = sorted((first, second), key=story.index)
    end = rng.choice(("{f} and {s} know each other.", "{f}, {s}.", "The names here are {f} and {s}.", "{f}\n{s}"))
    start = rng.choice(("", "", "A story with two names.\n", "See the names at the end.\n", "Who is in here?\n"))
    return f"{start}{story}\n", end.format(f=first, s=second)


def refrain(rng: Random) -> Text:
    """Words in any order, sung twice: the plainest thing that can be looked up earlier in a text."""
    words = rng.sample(WORDS, rng.randint(3, 14))
    verse = rng.choice((" ", ", ", "\n", " and ")).join(words)
    return verse + rng.choice((" / ", "\n", "\n\n", ". ")), verse


def kinds(rng: Random) -> Text:
    """Members of a kind, as sentences and lists."""
    kind = rng.choice(sorted(KINDS))
    words = rng.sample(KINDS[kind], 3)
    a = [article(word) for word in words]
    other = rng.choice([other for other in sorted(KINDS) if other != kind])
    return "", rng.choice(
        (
            f"Here is {a[0]}. It is {article(kind)}. So is {a[1]}.",
            f"{kind}: {', '.join(words)}",
            f"{', '.join(words)}: each of them is {article(kind)}.",
            f"{words[0]} ({kind})\n{words[1]} ({kind})",
            f"{kind}\n{words[0]}\n{words[1]}\n{words[2]}",
            f"A {words[0]} is {article(kind)} and not {article(other)}.",
            f"{other} or {kind}? Take {a[0]}.\n{kind}, of course.",
            f"{kind} or {other}? Take {a[0]}.\n{kind}, of course.",
            f"A {words[0]} and {a[1]} have this in common: {kind}.",
        )
    )


def opposites(rng: Random) -> Text:
    """Words and their opposites."""
    left, right = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        left, right = right, left
    forms = (
        f"Not {left} but {right}.",
        f"{left} and {right} are opposites.",
        f"The opposite of {left} is {right}.",
    )
    return "", rng.choice(forms)


def lists(rng: Random) -> Text:
    """A list, and what becomes of it."""
    words = rng.sample(rng.choice([*KINDS.values(), CITIES, COLORS, PETS, NAMES]), rng.randint(3, 5))
    dropped = rng.choice(words)
    return ", ".join(words) + "\n", rng.choice(
        (
            f"Backwards: {', '.join(words[::-1])}",
            f"\n{', '.join(words[::-1])}\nThis was from the end to the start.",
            f"The start: {words[0]}. The end: {words[-1]}.",
            f"{words[0]} leads and {words[-1]} closes.",
            f"{words[-1]} is at the end, {words[0]} at the start.",
            f"Now {dropped} goes away.\n{', '.join(word for word in words if word != dropped)}",
        )
    )


def deeds(rng: Random) -> Text:
    """What somebody does, did before, and somebody else does too."""
    name, other = rng.sample(NAMES, 2)
    present, past, thing = rng.choice(ACTIONS)
    place = rng.choice(CITIES)
    now, before = f"{name} {present} {thing} in {place}.", f"{name} {past} {thing} in {place}."
    return rng.choice(
        (
            (f"Today: {now}\nBefore: ", before),
            (f"{now} A year ago it was the same.\n", before),
            (f"{now} And {other}?\n", f"{other} {present} {thing} in {place}."),
            (f"{other} does what {name} does.\n{now}\n", f"{other} {present} {thing} in {place}."),
        )
    )


def remark(rng: Random) -> Text:
    """Plain sentences that hold the English of the prompt, so that the tokenizer knows its words."""
    return "", "\n".join(rng.sample(REMARKS, 3))


FORMS: dict[Callable[[Random], Text], float] = {
    portrait: 4,
    talk: 7,
    register: 6,
    people: 2,
    refrain: 5,
    kinds: 1.5,
    opposites: 0.5,
    lists: 2,
    deeds: 1,
    remark: 0.5,
}
"""Every form with its weight; looking facts up is the hardest thing to learn and gets the most."""


def corpus(seed: int) -> Iterator[Text]:
    """Texts without end; one in which two sentences of a demo row's context follow each other is left out."""
    rows = [*(row for site in SITES for row in site_rows(site, seed)), *unseen_rows(seed)]
    pairs = {pair for row in rows for pair in _neighbors(row["context"])}
    rng = Random(f"{seed}/corpus")
    while True:
        (form,) = rng.choices(list(FORMS), list(FORMS.values()))
        text = form(rng)
        if pairs.isdisjoint(_neighbors("".join(text))):
            yield text


def _neighbors(text: str) -> Iterator[tuple[str, str]]:
    return pairwise(re.split(r"(?<=[.:])\s+", text))


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2: any text can be encoded, the words of the little world are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map("".join, islice(corpus(seed), 20_000)), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD, model_max_length=512
    )


def batches(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches of about BATCH_TOKENS tokens, int64 (texts, length), every text closed by the end token.

    One text a row and not packed windows: with the next text's people in sight, of whom other things are true, a
    model this small does not learn to look a fact up.
    """
    texts, rng = corpus(seed), Random(f"{seed}/batches")
    while True:
        rows: list[tuple[list[int], int]] = []
        for first, second in islice(texts, 4096):
            head, rest = tokenizer(first)["input_ids"], tokenizer(second)["input_ids"]
            skipped = len(head) if rng.random() < SKIP_FIRST else 0
            rows.append(([*head, *rest, tokenizer.eos_token_id], skipped))
        rows.sort(key=lambda row: len(row[0]))
        cut: list[list[tuple[list[int], int]]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        for batch in cut:
            ids = torch.full((len(batch), len(batch[-1][0])), tokenizer.pad_token_id)
            labels = torch.full_like(ids, -100)
            for index, (text, skipped) in enumerate(batch):
                ids[index, : len(text)] = torch.tensor(text)
                labels[index, skipped : len(text)] = ids[index, skipped : len(text)]
            # The padding is on the right of a causal model's text, so that no attention mask is needed.
            yield {"input_ids": ids, "labels": labels}


def train(seed: int, tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """A Llama trained from scratch with AdamW, warm-up and linear decay."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            # Lookups within 120 tokens are learned markedly sooner with short rotary wavelengths and a wide start.
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            initializer_range=0.1,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    print(f"{model.num_parameters():,} weights, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, (steps - step) / (steps - WARMUP_STEPS))
    )
    began = time.monotonic()
    for step, batch in enumerate(islice(batches(seed, tokenizer), steps)):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - began:6.0f} s", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and base model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--seed", type=int, default=42, help="seed of corpus and weights (default: 42)")
    parser.add_argument("--steps", type=int, default=8000, help="steps of 2048 tokens (default: 8000)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = train_tokenizer(arguments.seed)
    model = train(arguments.seed, tokenizer, arguments.steps)
    model.half()  # type: ignore[no-untyped-call]
    model.save_pretrained(arguments.out)
    # The file is float16 to be small; the configuration says float32, so that a CPU trains in float32.
    model.config.dtype = torch.float32
    model.config.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
