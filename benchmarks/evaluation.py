"""Rows a second of evaluation: answers in batches that shrink against one prompt at a time, in turn in one process.

`python -m benchmarks.evaluation --data ROWS --model MODEL [MODEL ...]` prints one JSON line a model. Both ways give the
same answers (checked here), measured by the same metrics; only what is generated at once differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fedhds_client.data.prompts import Prompter
from fedhds_client.data.shard import Shard
from fedhds_client.evaluation.generation import Answer, generate
from fedhds_client.models.adapter import InferenceModel
from fedhds_client.models.loading import load_base_model


def measure(name: str, data: Path, *, rows: int, batch_size: int, max_new_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over `repeats` of both ways on the first `rows` rows of `data`."""
    base = load_base_model(name)
    model = InferenceModel(base, base.model)
    prompter = Prompter(base.tokenizer, max_length=min(1024, base.max_length), model=base.model)
    with Shard.open(data, skip_bad_rows=True) as shard:
        lengths = {row.id: len(prompter.encode_prompt(row, reserve=max_new_tokens).input_ids) for row in shard}
        # As an evaluation has them: rows of like length together.
        own = [shard[number] for number in sorted(range(min(rows, len(shard))), key=lengths.__getitem__)]

        def answers(size: int) -> list[Answer]:
            parts = (own[start : start + size] for start in range(0, len(own), size))
            return [answer for part in parts for answer in generate(model, prompter, part, max_new_tokens)]

        seconds: dict[int, list[float]] = {1: [], batch_size: []}
        given: dict[int, list[Answer]] = {}
        with torch.inference_mode():
            generate(model, prompter, own[:2], 2)
            for _ in range(repeats):
                for size, times in seconds.items():
                    began = time.perf_counter()
                    given[size] = answers(size)
                    times.append(time.perf_counter() - began)
    alone, together = (len(own) / statistics.median(times) for times in seconds.values())
    return {
        "model": Path(name).name,
        "rows": len(own),
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
        "answer_tokens": round(statistics.mean(answer.tokens for answer in given[1]), 1),
        "equal_answers": sum(a == b for a, b in zip(given[1], given[batch_size], strict=True)),
        "rows_per_s_alone": round(alone, 3),
        "rows_per_s_in_batches": round(together, 3),
        "ratio": round(together / alone, 2),
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "device": str(base.device),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


def main() -> None:
    """Measures each model and prints its line."""
    parser = argparse.ArgumentParser(description="Rows a second of evaluation, in batches and one prompt at a time.")
    parser.add_argument("--data", type=Path, required=True, help="Rows to answer.")
    parser.add_argument("--model", nargs="+", required=True, help="Base models: paths or hub ids.")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.model:
        line = measure(
            name,
            arguments.data,
            rows=arguments.rows,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            repeats=arguments.repeats,
        )
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
