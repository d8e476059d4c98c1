"""The fingerprint of a base model: a digest of each part that must be equal at every site, and one over all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

PARTS = {
    "weights": "the weights",
    "config": "the model configuration",
    "tokenizer": "the tokenizer",
    "template": "the prompt template",
    "feature_model": "the feature model",
}
"""The fields of fedhds.v2.ModelFingerprint, as messages name them; `feature_model` is empty where a run has none."""

_DIGEST = re.compile("[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


def combined(parts: Mapping[str, str]) -> str:
    """One SHA-256 over the digests of all parts, which people compare; empty for no parts."""
    if not any(parts.values()):
        return ""
    return hashlib.sha256("".join(f"{part} {parts.get(part, '')}\n" for part in PARTS).encode()).hexdigest()
