"""How much a training token counts: nothing where it is masked, more or less by its trace's weight.

mask_share: no loss on that share of the labels, those that the undistilled student finds least likely.
weights: a label's loss counts times its trace's weight; over the labels of the dataset weights have mean 1.

Shapes: N labels of the dataset.
"""

import functools
import json
import math

import torch
from tqdm import tqdm

from ads import chat
from ads.attacks.likelihood import label_losses
from ads.data.examples import num_labels
from ads.stage import files
from ads.stage.errors import UserError
from ads.stage.world import print0


def weighted(cfg, model, examples, world):
    """The examples as they are trained on: masked, those without a label left out, their weights scaled.

    model: the undistilled student; its adapters, if it has any, are at their start, where they do nothing.
    """
    if cfg.mask_share:
        masked = map(with_mask, examples, find_mask(cfg, model, examples, world))
        examples, num_all = [example for example in masked if num_labels(example)], len(examples)
        print0(f"mask_share={cfg.mask_share}: {len(examples)} of {num_all} sequences have tokens to train on")
    return scaled(examples) if cfg.weights else examples


def count_masked(mask_share, examples):
    """How many labels are masked, mask_share of all as Python rounds it; UserError if none is left."""
    num_all = sum(map(num_labels, examples))
    num_masked = round(mask_share * num_all)
    if num_masked == num_all:
        raise UserError(f"mask_share={mask_share}: leaves none of {num_all} tokens to train on; lower it")
    return num_masked


def find_mask(cfg, model, examples, world):
    """[the positions of each example that are masked], as the run that began this training found them."""
    mask = world.ask_main(read_mask, cfg.mask_path)
    if mask is None:
        mask = least_likely(losses_of(model, examples, world), cfg.mask_share, examples)
        if world.is_main:
            files.write_text(cfg.mask_path, json.dumps(mask))
    return mask


def read_mask(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def losses_of(model, examples, world):
    """label_losses of all examples, each process's share of them put together."""
    progress = functools.partial(tqdm, desc="losses", unit="batch", disable=not world.is_main, mininterval=2)
    is_training = model.training
    model.eval()  # no dropout
    shares = world.gather(label_losses(model, examples[world.rank :: world.size], progress=progress))
    model.train(is_training)
    return [shares[i % world.size][i // world.size] for i in range(len(examples))]


def least_likely(losses, share, examples):
    """[positions of each example that hold the labels of highest loss]; of equal ones, the first."""
    losses_N = torch.cat(losses)
    order_N = losses_N.sort(descending=True, stable=True).indices
    is_masked_N = torch.zeros(len(losses_N), dtype=torch.bool)
    is_masked_N[order_N[: count_masked(share, examples)]] = True
    mask = []
    for example, are_masked in zip(examples, is_masked_N.split([len(x) for x in losses]), strict=True):
        places = [i for i, label in enumerate(example["labels"]) if label != chat.IGNORED_LABEL]
        mask.append([i for i, is_masked in zip(places, are_masked.tolist(), strict=True) if is_masked])
    return mask


def with_mask(example, positions):
    labels = list(example["labels"])
    for i in positions:
        labels[i] = chat.IGNORED_LABEL
    return {**example, "labels": labels}


def scaled(examples):
    """The examples with weights whose mean over all labels is 1."""
    largest = max(example["weight"] for example in examples)  # by which no sum overflows
    parts = [example["weight"] / largest for example in examples]
    counts = list(map(num_labels, examples))
    mean = math.fsum(part * count for part, count in zip(parts, counts, strict=True)) / sum(counts)
    return [{**example, "weight": part / mean} for example, part in zip(examples, parts, strict=True)]


def describe(cfg, examples, trained):
    """What the sidecar tells of examples and what was trained on of them."""
    stats = {}
    if cfg.mask_share:
        stats["num_masked"] = sum(map(num_labels, examples)) - sum(map(num_labels, trained))
    if cfg.weights:
        weights = [example["weight"] for example in trained]
        stats |= {"weight_min": round(min(weights), 5), "weight_max": round(max(weights), 5)}
    return stats
