"""The demo's inputs: the shards' bytes, their redundancy, what the unseen rows share with them, and the model."""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import pytest

from demo.tasks import CATEGORIES, ROWS_PER_TOPIC, SITES, UNSEEN, UNSEEN_ROWS, Row, site_rows, unseen_rows, write

DEMO = Path(__file__).parents[2] / "demo"
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def shards() -> dict[str, list[Row]]:
    return {site.name: site_rows(site, 42) for site in SITES}


def words(row: Row) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", " ".join((row["instruction"], row["context"], row["response"])).lower()))


def share_with_near_duplicate(rows: list[Row], others: list[Row]) -> float:
    """Share of `rows` for which another row in `others` has a Jaccard similarity of words of 0.7 or more."""
    pool = [(other, words(other)) for other in others]

    def near(row: Row) -> bool:
        mine = words(row)
        # Comparing by the sizes first is exact: the similarity is at most the ratio of the sizes.
        return any(
            other is not row and min(len(mine), len(his)) >= 0.7 * max(len(mine), len(his))
            and len(mine & his) >= 0.7 * len(mine | his)
            for other, his in pool
        )  # fmt: skip

    return sum(map(near, rows)) / len(rows)


def test_the_script_writes_valid_rows(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "tasks.py", "--out", tmp_path / "new" / "folder"], check=True)
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == [*(f"{site.name}.jsonl" for site in SITES), "unseen.jsonl"]
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            assert list(row) == ["instruction", "context", "response", "category"]
            assert all(isinstance(value, str) and value == value.strip() for value in row.values())
            assert row["instruction"]
            assert 1 <= len(row["response"].split()) <= 12


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again, other = (write(tmp_path / name, seed) for name, seed in (("a", 42), ("b", 42), ("c", 43)))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert all(path.read_bytes() != path2.read_bytes() for path, path2 in zip(first, other, strict=True))


def test_the_sites_differ_in_size_and_mixture(shards: dict[str, list[Row]]) -> None:
    assert {name: len(rows) for name, rows in shards.items()} == {site.name: site.rows for site in SITES}
    mixtures = [Counter(row["category"] for row in rows) for rows in shards.values()]
    for one, other in combinations(mixtures, 2):
        # Total variation: the share of rows that would have to change category to make the two alike.
        shared = sum(min(one[name] / one.total(), other[name] / other.total()) for name in CATEGORIES)
        assert 1 - shared > 0.25
    assert {row["category"] for rows in shards.values() for row in rows} == set(CATEGORIES)


def test_no_site_holds_the_unseen_category_or_an_unseen_instruction(shards: dict[str, list[Row]]) -> None:
    unseen = unseen_rows(42)
    assert len(unseen) == UNSEEN_ROWS
    assert {row["category"] for row in unseen} == {UNSEEN.__name__}
    held = [row for rows in shards.values() for row in rows]
    assert UNSEEN.__name__ not in {row["category"] for row in held}
    assert {row["instruction"] for row in unseen}.isdisjoint(row["instruction"] for row in held)
    assert {row["context"] for row in unseen}.isdisjoint(row["context"] for row in held)


def test_a_site_holds_most_of_its_topics_in_several_wordings(shards: dict[str, list[Row]]) -> None:
    assert ROWS_PER_TOPIC > 1
    for rows in shards.values():
        assert len({(row["instruction"], row["context"]) for row in rows}) == len(rows)
        assert share_with_near_duplicate(rows, rows) > 0.5


def test_sites_hold_near_duplicates_of_each_others_rows(shards: dict[str, list[Row]]) -> None:
    for name, rows in shards.items():
        others = [row for other, held in shards.items() if other != name for row in held]
        assert share_with_near_duplicate(rows[::3], others) > 0.15


def test_the_model_is_small_and_loads_as_float32() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.dtype == torch.float32
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.chat_template is None
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "### Instruction:\nWho is Zoë?\n\n### Input:\n1 + 1 = 2 €"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_rows_are_short_for_the_model(shards: dict[str, list[Row]]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    texts = ["\n".join(row.values()) for rows in (*shards.values(), unseen_rows(42)) for row in rows]
    # The prompt's own words take 54 tokens of the 256.
    assert max(map(len, tokenizer(texts)["input_ids"])) < 128


def test_the_corpus_holds_neither_the_rows_nor_the_prompt_form(shards: dict[str, list[Row]]) -> None:
    pytest.importorskip("torch")
    from demo.pretrain import corpus

    text = "\x00".join("".join(text) for text in islice(corpus(42), 4_000))
    rows = [row for held in (*shards.values(), unseen_rows(42)) for row in held]
    assert not [row for row in rows if row["instruction"] in text]
    assert not [row for row in rows if row["context"].count(". ") and row["context"] in text]
    assert not [form for form in ("### Instruction:", "### Input:", "### Response:") if form in text]
