"""Tokens per second of distillation as in distill.py, beside transformers' Trainer with plain padding.

    python bench/distill.py MODEL_FOLDER gsm8k_train.jsonl.gz --traces 160 --runs 3 --sizes 2 4

Reads question and answer of the first rows as traces; trains LoRA adapters on them for one epoch with the
settings of train_config.yaml. Plain padding is the Trainer's random order, an attention mask, and the
model's own loss over the logits of all positions; `unmerged` is ours with PEFT's passes (no merged weights).
SIZES are per_device_batch_size. All take turns in each run, in processes of their own; medians, ranges, the
largest difference between loss curves, and peak memory of a process. Tokens are those of the traces, without
padding.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
import torch
from delta_agreement import read_sequences

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads import chat, cpu
from ads.attacks import training
from ads.stage.settings import TrainConfig
from ads.stage.world import World

WAYS = ("plain", "unmerged", "sorted")


def main():
    args = parse()
    examples = [
        {
            "input_ids": s.ids,
            "labels": [chat.IGNORED_LABEL] * s.num_prompt_tokens + s.ids[s.num_prompt_tokens :],
        }
        for s in read_sequences(args)
    ]
    num_tokens = sum(len(example["input_ids"]) for example in examples)
    ways = [(way, size) for size in args.sizes for way in WAYS]
    rates, curves, peaks = {way: [] for way in ways}, {}, {way: [] for way in ways}
    context = multiprocessing.get_context("spawn")
    for _ in range(args.runs):
        for way in ways:
            with context.Pool(1) as process:
                seconds, curves[way], peak = process.apply(train, (args, examples, *way))
            rates[way].append(num_tokens / seconds)
            peaks[way].append(peak)
            print(*way, round(rates[way][-1], 1), flush=True)
    table = [describe(way, rates, curves, peaks[way], args.sizes) for way in ways]
    for row in table:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    settings = {key: vars(args)[key] for key in ("model", "traces", "threads", "batch_size", "lora")}
    print(json.dumps({**settings, "tokens": num_tokens, "ways": table}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--traces", type=int, default=160)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2])
    parser.add_argument("--lora", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def train(args, examples, way, per_device):
    """(seconds, losses of the steps, peak MB of this process) of one epoch."""
    torch.set_num_threads(args.threads)
    if way == "unmerged":
        cpu.merged_adapters = contextlib.nullcontext
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            exp_dir=folder,
            student=args.model,
            lora=args.lora,
            lr=5e-4 if args.lora else 2e-5,
            batch_size=args.batch_size,
            per_device_batch_size=per_device,
            num_epochs=1.0,
            save_epochs=10.0,
        )
        tokenizer = chat.load_tokenizer(args.model, need_chat_template=False)
        model = training.load_student(cfg, tokenizer, "cpu")
        trainer = (plain_trainer if way == "plain" else training.make_trainer)(
            cfg, model, tokenizer, examples, None, per_device, World(0, 1, "cpu")
        )
        start = time.perf_counter()
        trainer.train() if way == "plain" else training.train_fast(trainer)
        seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seconds, losses, machine.peak_megabytes("cpu")


def plain_trainer(cfg, model, tokenizer, examples, holdout, per_device, world):
    from transformers import Trainer

    arguments = training.training_arguments(cfg, len(examples), holdout is not None, per_device, world)
    arguments.train_sampling_strategy = "random"
    collate = functools.partial(pad_right, pad_id=tokenizer.eos_token_id)
    return Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)


def pad_right(examples, pad_id):
    """input_ids, labels and attention_mask, (B, T) int64."""
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad_id, "labels": chat.IGNORED_LABEL}
    batch = {
        key: torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])
        for key, value in fill.items()
    }
    lengths_B1 = torch.tensor([[len(example["input_ids"])] for example in examples])
    return batch | {"attention_mask": (torch.arange(width) < lengths_B1).long()}


def describe(way, rates, curves, peaks, sizes):
    """Over plain padding with the same per_device_batch_size, and with the best one."""
    same = rates["plain", way[1]]
    best = max((rates["plain", size] for size in sizes), key=statistics.median)
    return {
        "way": way[0],
        "per_device_batch_size": way[1],
        "tokens_per_second": spread(rates[way], 0),
        "over_plain": spread(ratios(rates[way], same), 2),
        "over_best_plain": spread(ratios(rates[way], best), 2),
        "peak_megabytes": spread(peaks, 0),
        "loss_difference": f"{curve_difference(curves[way], curves['plain', way[1]]):.2g}",
    }


def ratios(values, others):
    return [value / other for value, other in zip(values, others, strict=True)]


def curve_difference(curve, other):
    return max(abs(a - b) for a, b in zip(curve, other, strict=True))


def spread(values, digits):
    """Median, and range in brackets."""
    median, low, high = (round(f(values), digits) for f in (statistics.median, min, max))
    return f"{median:g} ({low:g}-{high:g})"


if __name__ == "__main__":
    main()
