"""The demo's data: a little world of people and things, turned from a seed into instruction rows for four sites.

Every row has the keys of Databricks Dolly (instruction, context, response, category), because that is what
`fedhds-client --data` most often reads. The rows come from *topics*: the facts of a topic are drawn once, its
wording again for every row. A site holds most of its topics several times in other words, and a pool of common
topics belongs to several sites; this redundancy is what coreset selection is there to find. The sites differ in
size and in their mixture of categories, and one category, information extraction, belongs to none of them: it
measures whether tuning together helps on a task that nobody has.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

Row = dict[str, str]


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Mira Jonas Lena Tomas Nora Felix Clara Oskar Ida Milan Greta Hugo Selma Bruno Vera Anton Lotte Karl Paula Emil "
    "Marta Simon Julia Peter Sofia David Helena Viktor Rosa Martin Alma Theo"
)
CITIES = _words(
    "Oslo Rome Paris Vienna Prague Lisbon Berlin Madrid Dublin Athens Bergen Geneva Turin Lyon Porto Krakow Basel "
    "Ghent Malmo Riga"
)
JOBS = _words(
    "baker teacher doctor painter farmer sailor tailor driver gardener carpenter judge nurse pilot singer writer "
    "plumber"
)
PETS = _words("cat dog rabbit hamster parrot turtle pony goat canary goose")
DISHES = _words("bread soup rice pasta cheese cake pancakes salad porridge stew")
COLORS = _words("red blue green yellow black white brown purple")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

ATTRIBUTES: dict[str, list[str]] = {
    "city": CITIES,
    "job": JOBS,
    "pet": PETS,
    "dish": DISHES,
    "colour": COLORS,
    "day": DAYS,
}
"""What can be said of a person; every value is one word, so that a model of a million weights can copy it."""

STATEMENTS: dict[str, tuple[str, ...]] = {
    "city": ("{n} lives in {v}.", "The home of {n} is in {v}.", "{n} has a house in {v}."),
    "job": ("{n} works as a {v}.", "The job of {n} is {v}.", "{n} is a {v}."),
    "pet": ("{n} has a {v}.", "The pet of {n} is a {v}.", "{n} keeps a {v}."),
    "dish": ("{n} likes {v}.", "The favourite dish of {n} is {v}.", "{n} loves to eat {v}."),
    "colour": ("{n} wears a {v} coat.", "The coat of {n} is {v}.", "{n} bought a {v} coat."),
    "day": ("{n} is free on {v}.", "The free day of {n} is {v}.", "{n} has time on {v}."),
}

QUESTIONS: dict[str, tuple[str, ...]] = {
    "city": ("Where does {n} live?", "In which city does {n} live?", "What is the city of {n}?"),
    "job": ("What is the job of {n}?", "What does {n} work as?", "Which job does {n} have?"),
    "pet": ("Which pet does {n} have?", "What is the pet of {n}?", "Which animal does {n} keep?"),
    "dish": ("What does {n} like to eat?", "What is the favourite dish of {n}?", "Which dish does {n} like?"),
    "colour": (
        "Which colour is the coat of {n}?",
        "What colour does {n} wear?",
        "What is the colour of the coat of {n}?",
    ),
    "day": ("On which day is {n} free?", "When does {n} have time?", "What is the free day of {n}?"),
}

KINDS: dict[str, list[str]] = {
    "fish": _words("salmon trout carp herring tuna pike"),
    "bird": _words("sparrow robin falcon swan crow pigeon"),
    "fruit": _words("pear plum cherry lemon peach melon"),
    "tool": _words("hammer saw drill chisel shovel wrench"),
    "vehicle": _words("bus tram truck bicycle ferry wagon"),
    "instrument": _words("piano violin flute trumpet drum guitar"),
    "tree": _words("pine birch maple willow cedar beech"),
}

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("long", "short"), ("fast", "slow"), ("light", "dark"), ("wet", "dry"),
    ("loud", "quiet"), ("full", "empty"), ("hard", "soft"), ("young", "old"), ("rich", "poor"), ("high", "low"),
]  # fmt: skip

ACTIONS = [
    ("bakes", "baked", "a cake"), ("paints", "painted", "a fence"), ("repairs", "repaired", "a clock"),
    ("washes", "washed", "a window"), ("opens", "opened", "a shop"), ("carries", "carried", "a box"),
    ("plants", "planted", "a tree"), ("visits", "visited", "a friend"), ("cooks", "cooked", "a soup"),
    ("cleans", "cleaned", "a room"), ("watches", "watched", "a film"), ("rents", "rented", "a boat"),
]  # fmt: skip
"""Verb in the present, in the past, and what it is done to."""


def closed_qa(facts: Random, wording: Random) -> Row:
    """A question about the people in the text, answered by one or two words of the text."""
    form = facts.choice(("what", "what", "what", "who", "both", "people"))
    people = facts.sample(NAMES, 2)
    triples = [(name, attribute, value) for name in people for attribute, value in profile(facts, 2)]
    context = tell(triples, wording)
    name, attribute, value = facts.choice(triples)
    if form == "who" and sum(value == other for _, _, other in triples) == 1:
        question = STATEMENTS[attribute][0].format(n="Who", v=value).replace(".", "?")
        answer = name
    elif form == "both":
        (first, one), (second, two) = ((a, v) for n, a, v in triples if n == name)
        question = f"What are the {first} and the {second} of {name}?"
        answer = f"{one}, {two}"
    elif form == "people":
        question = wording.choice(("Who is in the text?", "Which two people is the text about?"))
        answer = ", ".join(sorted(people, key=context.index))
    else:
        question = wording.choice(QUESTIONS[attribute]).format(n=name)
        answer = value
    instruction = wording.choice(("{q}", "Read the text. {q}", "Answer the question: {q}")).format(q=question)
    return _row("closed_qa", instruction, context, answer)


def fill_in(facts: Random, wording: Random) -> Row:
    """A sentence with a gap, to be completed from the text."""
    people = facts.sample(NAMES, 2)
    triples = [(name, attribute, value) for name in people for attribute, value in profile(facts, 2)]
    name, attribute, value = facts.choice(triples)
    sentence = wording.choice(STATEMENTS[attribute])
    gap = sentence.format(n=name, v="___")
    ask = wording.choice(("Fill in the gap: {g}", "Complete the sentence: {g}", "Write the whole sentence: {g}"))
    return _row("fill_in", ask.format(g=gap), tell(triples, wording), sentence.format(n=name, v=value))


def classification(facts: Random, wording: Random) -> Row:
    """One word, and two or three labels of which one fits."""
    label, *others = facts.sample(sorted(KINDS), 3)
    word = facts.choice(KINDS[label])
    labels = [label, *others[: wording.choice((1, 2))]]
    wording.shuffle(labels)
    ask, context = wording.choice(
        (
            ("Sort the word into one of these groups: {l}.", word),
            ("Which of these labels fits the word best: {l}?", word),
            ("Pick the right label for {w}: {l}.", ""),
            ("Which group does {w} belong to: {l}?", ""),
        )
    )
    return _row("classification", ask.format(l=", ".join(labels), w=word), context, label)


def open_qa(facts: Random, wording: Random) -> Row:
    """A question about the world at large, answered without a text."""
    if facts.random() < 0.6:
        kind = facts.choice(sorted(KINDS))
        word = facts.choice(KINDS[kind])
        ask = ("What is a {w}?", "What kind of thing is a {w}?", "Can you tell me what a {w} is?")
        return _row("open_qa", wording.choice(ask).format(w=word), "", f"A {word} is {article(kind)}.")
    left, right = facts.choice(OPPOSITES)
    if facts.random() < 0.5:
        left, right = right, left
    ask = (
        "What is the opposite of {w}?",
        "Which word is the opposite of {w}?",
        "Tell me the opposite of {w}.",
    )
    return _row("open_qa", wording.choice(ask).format(w=left), "", f"The opposite of {left} is {right}.")


def list_editing(facts: Random, wording: Random) -> Row:
    """A list to be turned round, cut or asked for one of its items."""
    words = facts.sample(facts.choice([*KINDS.values(), CITIES, COLORS, PETS]), 4)
    operation = facts.choice(("reverse", "first", "last", "drop"))
    dropped = facts.choice(words)
    ask = {
        "reverse": (
            "Turn the list round.",
            "Write the list in reverse order.",
            "Reverse the order of the words.",
        ),
        "first": (
            "Give the first word of the list.",
            "Which word comes first?",
            "Name the first item of the list.",
        ),
        "last": (
            "Give the last word of the list.",
            "Which word comes last?",
            "Name the last item of the list.",
        ),
        "drop": ("Remove {w} from the list.", "Write the list without {w}.", "Take {w} out of the list."),
    }[operation]
    answer = {
        "reverse": words[::-1],
        "first": words[:1],
        "last": words[-1:],
        "drop": [word for word in words if word != dropped],
    }[operation]
    context = wording.choice(("{l}", "List: {l}", "The words are {l}.")).format(l=", ".join(words))
    return _row("list_editing", wording.choice(ask).format(w=dropped), context, ", ".join(answer))


def rewriting(facts: Random, wording: Random) -> Row:
    """A sentence to be put into the past, or to be told of somebody else."""
    name, other = facts.sample(NAMES, 2)
    present, past, thing = facts.choice(ACTIONS)
    place = facts.choice(CITIES)
    context = f"{name} {present} {thing} in {place}."
    if facts.random() < 0.5:
        ask = (
            "Put the sentence into the past tense.",
            "Rewrite the sentence in the past.",
            "Say that it happened before.",
        )
        return _row("rewriting", wording.choice(ask), context, f"{name} {past} {thing} in {place}.")
    ask = ("Rewrite the sentence about {o}.", "Replace {n} by {o}.", "Say the same of {o} instead of {n}.")
    instruction = wording.choice(ask).format(n=name, o=other)
    return _row("rewriting", instruction, context, f"{other} {present} {thing} in {place}.")


def brainstorming(facts: Random, wording: Random) -> Row:
    """Some examples of a kind; many answers are right, so these rows teach the form more than the facts."""
    kind = facts.choice(sorted(KINDS))
    number = facts.choice(("two", "three"))
    excluded, *words = facts.sample(KINDS[kind], 3 if number == "two" else 4)
    ask = (
        "Name {m} examples of {k} other than {w}.",
        "Think of {m} words for {k}, but not {w}.",
        "Besides {w}, list {m} examples of {k}.",
    )
    instruction = wording.choice(ask).format(m=number, k=article(kind), w=excluded)
    return _row("brainstorming", instruction, "", ", ".join(words))


def information_extraction(facts: Random, wording: Random) -> Row:
    """The unseen category: a field, two fields or the names, to be taken out of a text."""
    form = facts.choice(("field", "field", "field", "fields", "names"))
    name, other = facts.sample(NAMES, 2)
    triples = [(name, attribute, value) for attribute, value in profile(facts, 3)]
    (_, first, one), (_, second, two) = facts.sample(triples, 2)
    if form == "names":
        triples = [*triples[:2], *((other, attribute, value) for attribute, value in profile(facts, 2))]
        context = tell(triples, wording)
        ask: tuple[str, ...] = ("Extract the names.", "Find all names in the text.")
        answer = ", ".join(sorted((name, other), key=context.index))
        return _row("information_extraction", wording.choice(ask), context, answer)
    context = tell(triples, wording)
    if form == "field":
        ask = ("Extract the {a}.", "Find the {a} in the text.", "Give the {a} that the text mentions.")
        return _row("information_extraction", wording.choice(ask).format(a=first), context, one)
    ask = ("Extract the {a} and the {b}.", "Find the {a} and the {b} in the text.")
    return _row("information_extraction", wording.choice(ask).format(a=first, b=second), context, f"{one}, {two}")


Builder = Callable[[Random, Random], Row]
"""Makes a row: the first source of randomness decides what the row says, the second in which words."""

CATEGORIES: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (closed_qa, fill_in, classification, open_qa, list_editing, rewriting, brainstorming)
}
UNSEEN: Builder = information_extraction
UNSEEN_ROWS = 80


@dataclass(frozen=True)
class Site:
    """One client of the demo."""

    name: str
    rows: int
    mixture: dict[str, float]
    """Relative weight of each category; this site has no row of a category that is left out."""


SITES = (
    Site("site-a", 720, {"classification": 6, "open_qa": 4, "closed_qa": 1, "list_editing": 1}),
    Site("site-b", 560, {"closed_qa": 6, "fill_in": 4, "rewriting": 1, "open_qa": 1}),
    Site("site-c", 440, {"list_editing": 5, "rewriting": 5, "fill_in": 1, "brainstorming": 1}),
    Site("site-d", 280, {"brainstorming": 6, "classification": 3, "closed_qa": 1, "rewriting": 1}),
)

ROWS_PER_TOPIC = 4
"""How often a site meets each of its topics on average: enough near-duplicates for clusters to show themselves."""
COMMON_SHARE = 0.35
COMMON_TOPICS = 24
"""Topics per category in the pool that all sites draw from."""


def site_rows(site: Site, seed: int) -> list[Row]:
    """The shard of `site`: no row twice, most rows similar to others."""
    wording = Random(f"{seed}/{site.name}")
    own_topics = max(1, round(site.rows / ROWS_PER_TOPIC / len(site.mixture)))
    rows: dict[tuple[str, str], Row] = {}
    while len(rows) < site.rows:
        (category,) = wording.choices(list(site.mixture), list(site.mixture.values()))
        if wording.random() < COMMON_SHARE:
            topic = f"common/{wording.randrange(COMMON_TOPICS)}"
        else:
            topic = f"{site.name}/{wording.randrange(own_topics)}"
        row = CATEGORIES[category](Random(f"{seed}/{category}/{topic}"), wording)
        rows.setdefault((row["instruction"], row["context"]), row)
    return list(rows.values())


def unseen_rows(seed: int) -> list[Row]:
    """The evaluator's rows: every one a topic of its own."""
    wording = Random(f"{seed}/unseen")
    return [UNSEEN(Random(f"{seed}/unseen/{topic}"), wording) for topic in range(UNSEEN_ROWS)]


def write(folder: Path, seed: int) -> list[Path]:
    """Write the four shards and the unseen rows into `folder`; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = {site.name: site_rows(site, seed) for site in SITES} | {"unseen": unseen_rows(seed)}
    return [_write_lines(folder / f"{name}.jsonl", rows) for name, rows in shards.items()]


def _write_lines(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    return path


def article(noun: str) -> str:
    """`noun` with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _row(category: str, instruction: str, context: str, response: str) -> Row:
    return {"instruction": instruction, "context": context, "response": response, "category": category}


def profile(facts: Random, size: int) -> list[tuple[str, str]]:
    """`size` different attributes with a value each."""
    return [(attribute, facts.choice(ATTRIBUTES[attribute])) for attribute in facts.sample(sorted(ATTRIBUTES), size)]


def tell(triples: list[tuple[str, str, str]], wording: Random) -> str:
    """The facts (name, attribute, value) as sentences in some order."""
    sentences = [wording.choice(STATEMENTS[attribute]).format(n=name, v=value) for name, attribute, value in triples]
    wording.shuffle(sentences)
    return " ".join(sentences)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's four shards and its unseen evaluation rows.")
    parser.add_argument("--out", type=Path, required=True, help="folder for site-a.jsonl .. site-d.jsonl, unseen.jsonl")
    parser.add_argument("--seed", type=int, default=42, help="the same seed writes the same bytes (default: 42)")
    arguments = parser.parse_args()
    for path in write(arguments.out, arguments.seed):
        print(path)


if __name__ == "__main__":
    main()
