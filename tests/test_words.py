"""The words of the repository: American spelling, plain phrases, and no name that the code has given up."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".proto", ".yml", ".yaml", ".sh", ".js", ".css", ".html", ".j2"}
# The demo's data, on which its model was trained; generated code; this file.
EXEMPT = ("demo/tasks.py", "demo/pretrain.py", "common/fedhds/v2/", "tests/test_words.py")

BRITISH = re.compile(
    r"\w*(?:"
    r"(?:optim|organ)is(?![mt])|(?:normal|quant|serial|recogn|initial|summar|synchron|minim|maxim|util|central|random"
    r"|general|author)is(?!m)|analys(?:e[dr]?|ing)\b|cent(?:re|ring)|licence|colour|behaviour|neighbour|favour|honour"
    r"|(?:label|model|travel|dial|signal)l(?:ed|ing)\b|catalogue|\bgrey\b|enrolment|\benrol(?:s?\b|_)"
    r"|judgement|artefact)\w*",
    re.IGNORECASE,
)
PHRASES = [
    "held against",
    "holds? (?:it |them )?against",
    "mend(?:s|ed|ing)?",
    "anew",
    "whoever",
    "whatever it be",
    "for want of",
    "told in what",
    "carr(?:y|ies|ied|ying) (?:it |them )?out",
    "bears?",
    "nobody who is here",
    "more kills",
]
RENAMED = {
    r"(?<![\w-])--(?:patience|oversample|clip-norm|noise-multiplier|max-epsilon|fusion|lloyd-passes"
    r"|share-exact-cells|http-open|clients)\b": "a flag of an earlier version",
    r"FEDHDS_(?:PATIENCE|OVERSAMPLE|CLIP_NORM|NOISE_MULTIPLIER|MAX_EPSILON|FUSION|LLOYD_PASSES|STRATEGY"
    r"|SCHEDULE|BUDGET|SHARE_EXACT_CELLS|HTTP_OPEN|MODEL_LICENCE|DATA_LICENCE)\b": "a variable of an earlier version",
    r"fedhds_(?:rounds_wanted|sites_wanted|evaluation_loss|evaluation_rouge_l|fold_seconds|collection_\w+)": (
        "a metric of an earlier version"
    ),
    r"(?<!early-stop-)\bpatience\b": "heartbeat timeout, reconnect timeout",
    r"\boversampl\w*": "over-selection",
    r"\bfusion\b": "reduction",
    r"lloyd(?!')\w*": "k-means",
    r"CellReport|\w+_cells?\b|\bcell_\w+|[.\"]cells\b|\bcells=|(?:of|over|all|last|exact) cells": "cluster statistics",
    r"strategy[\s=:\"'`]+global\b": "federated-kmeans",
    r"\b[Aa]ttest\w*": "register",
    r"\w*Workbench\w*|\bworkbench\b": "TaskExecutor",
    r"\w*CoordinatorLink\w*": "CoordinatorClient",
    r"\bTerm\(|import Term\b": "LeaderGate",
    r"\bapportion\w*": "allocation",
    r"\bCollection\.of\b|\bcollection\.(?:away|answered|working|failed|target|quorum)\b|\"(?:collection|away)\"": (
        "CohortProgress, disconnected"
    ),
    r"\bTeam\b|\bOrder\(": "ProcessGroup, Command",
    r"\bBeside\(": "BackgroundStep",
    r"\bShown\(": "ProgressDisplay",
    r"\bReleases\(": "PrivateReporter",
    r"\bFacts\(": "UpdateMetadata",
    r"\bsteering\b": "control",
    r"\bfloor-(?:sync|aio)\b|\bduties\b|\bstorms?\b": "baseline, secure baseline, burst",
    r"fedhds_server[./](?:wire|page|plane|counted|collection|term|enrolment|store)\b": "a module of an earlier version",
    r"fedhds_client[./](?:link|workbench|counted|fusion|cells|release)\b": "a module of an earlier version",
    r"fedhds[./](?:runspec|telemetry|web)\b|(?:proto/|from |import )fedhds[./]v1": "a module of an earlier version",
}
# What speaks of earlier versions must say their words.
ALLOWED = {
    "server/fedhds_server/rpc/protocol_1.py": {"EnrolmentRefused"},
    "tests/e2e/test_upgrade.py": {"EnrolmentRefused"},
    "tests/server/test_protocol_1.py": {"EnrolmentRefused"},
}


@cache
def texts() -> dict[str, str]:
    """All tracked files of prose and code, by path; of the changelog the prose of what is not released."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    found = {}
    for name in listed:
        path = ROOT / name
        if path.suffix in SUFFIXES and not name.startswith(EXEMPT) and path.exists():
            found[name] = path.read_text(encoding="utf-8")
    unreleased = re.split(r"^## \d", found["CHANGELOG.md"], flags=re.MULTILINE)[0]
    found["CHANGELOG.md"] = re.sub(r"`[^`\n]*`", "", unreleased)
    return found


def hits(pattern: str | re.Pattern[str]) -> list[str]:
    """Where the pattern is found and not allowed, as PATH:LINE: WORDS."""
    return [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]}"
        for name, text in texts().items()
        for match in re.finditer(pattern, text)
        if match[0] not in ALLOWED.get(name, ())
    ]


def test_files_are_read() -> None:
    # What reads none would let everything below pass.
    assert {Path(name).suffix for name in texts()} == SUFFIXES
    assert len(texts()) > 300


def test_spelling_is_american() -> None:
    # By the distinct words, which are few: the pattern takes seconds for all texts.
    words = {word for text in texts().values() for word in re.findall(r"\w+", text)}
    british = sorted(word for word in words if BRITISH.search(word))
    # What is allowed is among them.
    assert british
    assert hits(rf"\b(?:{'|'.join(british)})\b") == []


@pytest.mark.slow
@pytest.mark.parametrize("phrase", PHRASES)
def test_phrases_are_plain(phrase: str) -> None:
    # Over the ends of lines, of comments and of parts of a string, too.
    spaced = phrase.replace(" ", r"""[\s#"'/]+""")
    assert hits(re.compile(rf"\b(?:{spaced})\b", re.IGNORECASE)) == []


@pytest.mark.slow
@pytest.mark.parametrize("pattern", RENAMED, ids=lambda pattern: pattern[:30])
def test_names_that_were_given_up_are_gone(pattern: str) -> None:
    assert hits(pattern) == [], f"say {RENAMED[pattern]}"
