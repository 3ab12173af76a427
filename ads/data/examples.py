"""Traces as training sequences, in the order that a student sees them.

An example has input_ids and labels, which are chat.IGNORED_LABEL where nothing is learned; perhaps a weight.
"""

import math
from pathlib import Path
from typing import Any

from ads import chat
from ads.data.problems import load_problems
from ads.data.tables import check_each, check_traces, read_parquet
from ads.stage.errors import UserError
from ads.stage.settings import AttackConfig, TrainConfig
from ads.stage.world import print0

Example = dict[str, Any]


def load_examples(
    cfg: TrainConfig | AttackConfig, tokenizer: Any, path: str | Path, with_weights: bool = False
) -> tuple[list[Example], int]:
    """(examples of a trace dataset, how many were cut to max_length); their weights are those of the rows."""
    rows = read_parquet(path)
    check_traces(path, rows, text=("problem", cfg.trace_colname), flags=("finished",))
    return make_examples(cfg, tokenizer, rows, str(path), with_weights)


def load_training(cfg: TrainConfig, tokenizer: Any) -> tuple[list[Example], int]:
    """(examples that a student is trained on, how many were cut): traces, or a data split's own solutions."""
    if not cfg.solutions:
        return load_examples(cfg, tokenizer, cfg.train_traces or "", cfg.weights)
    problems = load_problems(cfg.solutions, cfg.data_dir, cfg.max_samples, cfg.seed)
    rows = [{"problem": p["problem"], cfg.trace_colname: p["solution"], "finished": True} for p in problems]
    return make_examples(cfg, tokenizer, rows, cfg.solutions, cfg.weights)


def make_examples(
    cfg: TrainConfig | AttackConfig,
    tokenizer: Any,
    rows: list[Example],
    source: str,
    with_weights: bool = False,
) -> tuple[list[Example], int]:
    """(examples of rows, how many were cut to max_length); source: where they are from, for what is said."""
    if with_weights:
        check_each(source, rows, check_weight)
    examples, num_cut = [], 0
    for row in rows:
        example, is_cut = example_of(cfg, tokenizer, row)
        num_cut += is_cut
        if num_labels(example):
            examples.append(example | ({"weight": float(row["weight"])} if with_weights else {}))
    if not examples:
        raise UserError(f"{source}: no trace has a token to train on within max_length={cfg.max_length}")
    if num_cut:
        print0(f"{source}: {num_cut} of {len(rows)} sequences are cut to max_length={cfg.max_length}")
    return examples, num_cut


def example_of(cfg: TrainConfig | AttackConfig, tokenizer: Any, row: Example) -> tuple[Example, bool]:
    """(the example of a row, whether it was cut to max_length)."""
    ids, labels = chat.student_example(tokenizer, row["problem"], row[cfg.trace_colname], row["finished"])
    example = {"input_ids": ids[: cfg.max_length], "labels": labels[: cfg.max_length]}
    return example, len(ids) > cfg.max_length


def check_weight(row: Example) -> None:
    """ValueError unless a row has a weight that a loss can be multiplied by."""
    if "weight" not in row:
        raise UserError("no column weight, which weights=true needs (attack=reweight makes one)")
    weight = row["weight"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"weight must be a finite number above 0, but is {ascii(weight)[:50]}")


def order_examples(cfg: TrainConfig, examples: list[Example]) -> list[Example]:
    """All epochs' examples, one step's batch_size after another, a step's from longest to shortest.

    An epoch is a random order by (seed, epoch). Processes and micro-batches take neighbours, and so get like
    lengths. What an epoch's last step lacks is filled with an example of one token and no label.
    """
    import torch

    steps = []
    for epoch in range(math.ceil(cfg.num_epochs)):
        generator = torch.Generator().manual_seed(cfg.seed + epoch)
        shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
        for start in range(0, len(shuffled), cfg.batch_size):
            step = longest_first(shuffled[start : start + cfg.batch_size])
            steps.append(fill_up(step, cfg.batch_size))
    num_steps = math.ceil(cfg.num_epochs * math.ceil(len(examples) / cfg.batch_size))
    return [example for step in steps[:num_steps] for example in step]


def longest_first(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=num_tokens, reverse=True)


def fill_up(examples: list[Example], size: int) -> list[Example]:
    """The examples, and ones of one token and no label that make their number a multiple of size."""
    empty = examples[0] | {"input_ids": examples[0]["input_ids"][:1], "labels": [chat.IGNORED_LABEL]}
    return examples + [empty] * (-len(examples) % size)


def num_tokens(example: Example) -> int:
    return len(example["input_ids"])


def num_labels(example: Example) -> int:
    """How many tokens of an example are trained on."""
    return sum(label != chat.IGNORED_LABEL for label in example["labels"])
