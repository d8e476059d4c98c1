"""Tokens a second and peak memory of local training, beside trl's SFTTrainer and transformers' Trainer.

All train the same adapter on the same rows, with the same batch size, steps, optimizer, precision and threads, each in
a process of its own; the order alternates from one repetition to the next, so that a machine that slows down slows all
alike. Tokens are those of prompts and responses, without padding, as this project's prompts make them, and time is that
of the training loop: imports, loading and, of the two others, tokenization are not counted; of `ours` it is. Peak
memory is the kernel's high-water mark of the process on a CPU, and that of torch's allocator on a GPU.

In bfloat16, `ours` keeps the base model in bfloat16 and the adapter in float32, as it always does; the two others get
the model in the same types and `bf16=True`, which is what their users set.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VARIANTS = ("ours", "trl", "trainer")
MAX_LENGTH = 512
OUT = Path(__file__).with_name("results") / "training.jsonl"

Line = dict[str, Any]


def main() -> None:
    """Measures everything, or, with `--variant`, one case in this process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="rows (Dolly-15k)")
    parser.add_argument("--model", required=True, nargs="+", help="folders or hub ids")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(_measure(arguments)))
        return
    arguments.out.parent.mkdir(exist_ok=True)
    for model in arguments.model:
        for repetition in range(arguments.repetitions):
            for dtype in arguments.dtypes:
                for variant in arguments.variants[:: -1 if repetition % 2 else 1]:
                    line = _in_a_process(arguments, model, dtype, variant) | {"repetition": repetition}
                    print(json.dumps(line), flush=True)
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    print(table([json.loads(line) for line in arguments.out.read_text().splitlines()]))


def table(lines: Sequence[Line]) -> str:
    """Medians by model, precision and variant, as Markdown."""
    rows = ["| model | precision | loop | tokens/s | peak MB | loss |", "| --- | --- | --- | --- | --- | --- |"]
    cases = dict.fromkeys((line["model"], line["dtype"], line["variant"]) for line in lines)
    for case in cases:
        own = [line for line in lines if (line["model"], line["dtype"], line["variant"]) == case]
        speed, memory, loss = (
            sorted(line[key] for line in own)[len(own) // 2] for key in ("tokens_per_s", "peak_mb", "loss")
        )
        rows.append(f"| {' | '.join(case)} | {speed:,.0f} | {memory:,.0f} | {loss:.4f} |")
    return "\n".join(rows)


def _in_a_process(arguments: argparse.Namespace, model: str, dtype: str, variant: str) -> Line:
    flags = {"data": arguments.data, "model": model, "rows": arguments.rows, "batch-size": arguments.batch_size}
    flags |= {"dtypes": dtype, "variant": variant, "device": arguments.device, "threads": arguments.threads}
    command = [sys.executable, "-W", "ignore", "-m", __spec__.name]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    line: Line = json.loads(process.stdout.splitlines()[-1])
    return line


def _measure(arguments: argparse.Namespace) -> Line:
    import torch

    from fedhds.spec import RunSpec
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.data.shard import Shard
    from fedhds_client.models.adapter import AdapterModel
    from fedhds_client.models.loading import load_base_model

    (model,), (dtype,), variant = arguments.model, arguments.dtypes, arguments.variant
    spec = RunSpec.of(
        model=model, rounds=1, batch_size=arguments.batch_size, learning_rate=1e-4, lora_dropout=0.0, lora_rank=8
    )
    torch.manual_seed(0)
    base = load_base_model(model, device=arguments.device, dtype=dtype)
    adapter = AdapterModel(base, spec)
    prompter = Prompter(base.tokenizer, max_length=min(MAX_LENGTH, base.max_length))
    with Shard.open(arguments.data) as shard:
        # Spread over the file, whose rows may be in an order.
        rows = list(range(0, len(shard), max(1, len(shard) // arguments.rows)))[: arguments.rows]
        encoded = [prompter.encode(shard[row]) for row in rows]
        tokens = sum(len(row.input_ids) for row in encoded)
        if variant == "ours":
            from fedhds_client.training.loop import train

            outcome = train(
                adapter,
                shard,
                rows,
                prompter,
                spec.training,
                seed=0,
                progress=lambda share: None,
                cancelled=lambda: False,
            )
            seconds, loss = outcome.seconds, outcome.loss
        else:
            seconds, loss = _theirs(variant, adapter, encoded, spec, bfloat16=dtype == "bfloat16")
    memory = torch.cuda.max_memory_allocated() / 2**20 if arguments.device == "cuda" else _resident_mb()
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "variant": variant,
        "rows": len(rows),
        "batch_size": arguments.batch_size,
        "threads": arguments.threads,
        "device": arguments.device,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_mb": round(memory),
        "loss": round(loss, 4),
    }


def _theirs(variant: str, adapter: Any, encoded: Sequence[Any], spec: Any, *, bfloat16: bool) -> tuple[float, float]:
    """Seconds and mean loss of one epoch of trl's or transformers' trainer over the same tokens."""
    import transformers
    from datasets import Dataset

    training = spec.training
    fields: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": training.batch_size,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "bf16": bfloat16,
        "use_cpu": adapter.device.type == "cpu",
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    labels = [
        [token if wanted else -100 for token, wanted in zip(row.input_ids, row.loss, strict=True)] for row in encoded
    ]
    columns = {"input_ids": [row.input_ids for row in encoded], "labels": labels}
    trainer: Any
    if variant == "trl":
        import trl

        masks = [[int(wanted) for wanted in row.loss] for row in encoded]
        data = Dataset.from_dict({"input_ids": columns["input_ids"], "completion_mask": masks})
        trainer = trl.SFTTrainer(
            model=adapter.module,
            args=trl.SFTConfig(**fields, max_length=None, completion_only_loss=True),
            train_dataset=data,
            processing_class=adapter.tokenizer,
        )
    else:
        collator = transformers.DataCollatorForSeq2Seq(adapter.tokenizer)
        trainer = transformers.Trainer(
            model=adapter.module,
            args=transformers.TrainingArguments(**fields),
            train_dataset=Dataset.from_dict(columns),
            data_collator=collator,
        )
    adapter.module.train()
    started = time.monotonic()
    outcome = trainer.train()
    return time.monotonic() - started, float(outcome.training_loss)


def _resident_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
