"""The stock way: TRL's trainer, and a callback that uploads each checkpoint to the bucket before training goes on.

``stock.py MODEL DATA BUCKET STEPS EVERY`` prints, as JSON, the seconds between the end of a step and the beginning of
the next one (or of the end of training), by step, and the bytes of a checkpoint.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


class Synchronous(TrainerCallback):
    """Uploads what the trainer saved, and takes the time between steps."""

    def __init__(self, bucket: str) -> None:
        self.s3, self.bucket = boto3.client("s3"), bucket
        self.gaps: dict[int, float] = {}
        self.bytes, self.ended = 0, 0.0

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """Upload the newest checkpoint, file by file, as users' callbacks do it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.bytes = sum(path.stat().st_size for path in files)
        for path in files:
            self.s3.upload_file(str(path), self.bucket, f"stock/{path.relative_to(args.output_dir)}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """The step is over."""
        self.ended = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """The next one begins."""
        if self.ended:
            self.gaps[state.global_step] = time.monotonic() - self.ended

    on_train_end = on_step_begin


def main() -> None:
    """Train with the settings of the job's smoke run."""
    model, data, bucket, steps, every = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
    rows = load_dataset("json", data_files=data, split="train")
    told = rows.map(
        lambda row: {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ]
        },
        remove_columns=rows.column_names,
    )
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    taken = Synchronous(bucket)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, quantization_config=quantized, dtype=torch.bfloat16),
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=told,
            peft_config=LoraConfig(
                r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            args=SFTConfig(
                output_dir=folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
                learning_rate=5e-4, optim="adamw_8bit", max_length=128, save_steps=every, save_total_limit=2, bf16=True,
                use_cpu=not torch.cuda.is_available(), report_to=[], disable_tqdm=True, logging_steps=1,
            ),
            callbacks=[taken],
        )  # fmt: skip
        trainer.train()
    sys.stdout.write(json.dumps({"gaps": taken.gaps, "bytes": taken.bytes}) + "\n")


if __name__ == "__main__":
    main()
