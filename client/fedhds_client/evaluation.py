"""Loss and Rouge-L on held-out rows."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import GenerationConfig

from fedhds.errors import TaskError
from fedhds_client.computation import Cancelled
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.prompts import Prompter
from fedhds_client.response_loss import ResponseLoss
from fedhds_client.row_formats import Row
from fedhds_client.shard import Shard


@dataclass(frozen=True, slots=True)
class EvaluationSums:
    """Sums over rows; they combine by +, in any order."""

    rows: int = 0
    tokens: int = 0
    loss_sum: float = 0.0
    rouge_l_sum: float = 0.0

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        return EvaluationSums(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.loss_sum + other.loss_sum,
            self.rouge_l_sum + other.rouge_l_sum,
        )

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per response token, in nats."""
        return self.loss_sum / max(self.tokens, 1)

    @property
    def rouge_l(self) -> float:
        """Mean Rouge-L F1, 0 to 1."""
        return self.rouge_l_sum / max(self.rows, 1)


class _Words:
    """Words in any script; rouge_score's own tokenizer knows a-z and 0-9 and finds nothing in Greek or Chinese.

    On ASCII text the two agree. Scripts without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) count by
    character, and so does Korean, whose particles stick to words.
    """

    _PATTERN = re.compile(
        r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]"
        r"|[^\s\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff]+"
    )

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words."""
        composed = unicodedata.normalize("NFC", text.lower())
        # Combining marks belong to words, as Hindi's vowels do.
        kept = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in composed)
        return self._PATTERN.findall("".join(kept))


_SCORER = RougeScorer(["rougeL"], tokenizer=_Words())


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """Rouge-L F1 of an answer, the best over its references."""
    return max(float(_SCORER.score(reference, answer)["rougeL"].fmeasure) for reference in references)


def evaluate(
    model: InferenceModel,
    shard: Shard,
    prompter: Prompter,
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[float], None] = lambda share: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> EvaluationSums:
    """Measures all rows of `shard`: loss of the given responses, Rouge-L of greedy answers.

    Rows of like length share a batch; that changes padding, not results. Raises Cancelled, and TaskError when memory
    runs out or the loss is not finite.
    """
    order = sorted(range(len(shard)), key=lambda row: len(prompter.encode(shard[row]).input_ids))
    loss_of = ResponseLoss(model)
    sums = EvaluationSums()
    model.module.eval()
    try:
        for begin in range(0, len(order), batch_size):
            if cancelled():
                raise Cancelled("the evaluation was stopped")
            rows = [shard[row] for row in order[begin : begin + batch_size]]
            with torch.inference_mode():
                total, tokens = loss_of([prompter.encode(row) for row in rows])
                answers = generate(model, prompter, rows, max_new_tokens)
            if not math.isfinite(float(total)):
                raise TaskError("the loss on the held-out rows is not finite under this adapter")
            score = sum(
                rouge_l(answer, row.references or (row.response,)) for answer, row in zip(answers, rows, strict=True)
            )
            sums += EvaluationSums(len(rows), tokens, float(total), score)
            progress((begin + len(rows)) / len(order))
    except torch.OutOfMemoryError as error:
        raise TaskError("the device ran out of memory in evaluation; lower --inference-batch-size") from error
    return sums


def generate(model: InferenceModel, prompter: Prompter, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Greedy answers, in the order of `rows`; left padding, made here, as decoding goes on at the right.

    They end at a stop token, or after `max_new_tokens` or what the model's context leaves.
    """
    prompts = [prompter.encode_prompt(row, reserve=max_new_tokens).input_ids for row in rows]
    longest = max(map(len, prompts))
    pad = int(model.tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    inner = model.base.model
    own = inner.generation_config
    ends = {model.tokenizer.eos_token_id}
    if own is not None and own.eos_token_id is not None:
        ends |= set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id])
    # A prompt takes what the answer leaves, but at least a quarter of the longest row.
    room = min(max_new_tokens, model.base.max_length - prompter.max_length // 4)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    # Of the model's own defaults its stop tokens count; penalties, beams and the like, which transformers would take
    # over where `config` is silent, must not decide what is measured. PEFT's wrapper takes the inner model's, too.
    inner.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        out = model.module.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        inner.generation_config = own
    texts: list[str] = model.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts
