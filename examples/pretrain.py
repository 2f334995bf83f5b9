"""Trains generated weights on with transformers' Trainer: a text of your own, resume, and a tracker if you like.

    headstart generate --target config.json --method weight-selection --zoo zoo --out start
    python examples/pretrain.py start --text corpus.txt --out trained --steps 1000

The tokenizer is that of the folder, or of --tokenizer. The learning rate and the warm-up are those that the folder's
headstart.json names for such a start, unless you give others. Run the same command again to continue after a stop.
`--report-to wandb` (or tensorboard, …) sends the losses to a tracker that you have installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from transformers.trainer_utils import get_last_checkpoint

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def main(arguments: list[str] | None = None) -> Trainer:
    """Trains, and saves model and tokenizer to --out."""
    given = _parser().parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer or given.start)
    model = AutoModelForCausalLM.from_pretrained(given.start)
    if len(tokenizer) > model.config.vocab_size:
        raise SystemExit(f"{len(tokenizer)} tokens do not fit a vocabulary of {model.config.vocab_size}")
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    blocks = read_blocks(given.text, given.column, tokenizer, given.sequence)
    held_out = max(1, len(blocks) // 100)
    trainer = Trainer(
        model=model,
        args=training_arguments(given),
        train_dataset=blocks.select(range(len(blocks) - held_out)),
        eval_dataset=blocks.select(range(len(blocks) - held_out, len(blocks))),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(given.out) if Path(given.out).is_dir() else None)
    trainer.save_model(given.out)
    return trainer


def read_blocks(text: str, column: str, tokenizer: Any, length: int) -> Dataset:
    """The text as blocks of `length` tokens, with an end-of-text token after each document where there is one."""
    documents = load_dataset(FORMATS[Path(text).suffix], data_files=text, split="train")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch[column], add_special_tokens=False)["input_ids"]
        ids = list(itertools.chain.from_iterable([*document, *end] for document in encoded))
        blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {"input_ids": blocks, "labels": blocks}

    blocks = documents.map(pack, batched=True, remove_columns=documents.column_names)
    if len(blocks) < 2:
        raise SystemExit(
            f"{text}: has fewer than two blocks of {length} tokens; give more text or a smaller --sequence"
        )
    return blocks


def training_arguments(given: argparse.Namespace) -> TrainingArguments:
    """AdamW with a warm-up and a cosine, as the benchmark trained."""
    record = Path(given.start) / "headstart.json"
    advice = (json.loads(record.read_text()).get("next_step") if record.is_file() else None) or {}
    rate = given.lr or advice.get("learning_rate")
    if rate is None:
        raise SystemExit("give --lr: the folder's headstart.json names no learning rate")
    warmup = given.warmup if given.warmup is not None else advice.get("warmup", 0.05)
    print(f"learning rate {rate:g}, warm-up over {warmup:.0%} of {given.steps} steps")
    return TrainingArguments(
        output_dir=given.out,
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        learning_rate=rate,
        warmup_steps=max(1, round(warmup * given.steps)),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(1, given.steps // 20),
        eval_strategy="steps",
        eval_steps=max(1, given.steps // 5),
        save_steps=max(1, given.steps // 5),
        save_total_limit=2,
        report_to=given.report_to,
        seed=given.seed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", help="a folder that `headstart generate` wrote")
    parser.add_argument("--text", required=True, help="a .txt, .jsonl or .parquet file")
    parser.add_argument("--column", default="text", help="the column with the text")
    parser.add_argument("--tokenizer", help="a folder or hub id [default: the one in the folder]")
    parser.add_argument("--out", required=True, help="a folder for checkpoints and the trained model")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--lr", type=float, help="peak learning rate [default: what headstart.json names]")
    parser.add_argument("--warmup", type=float, help="share of the steps [default: what headstart.json names]")
    parser.add_argument("--report-to", default="none", help="a tracker that transformers knows")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
