"""The loss of stages 2 and 4: -log p of the tokens that are trained on, and logits of hardly any others.

Rows are padded on the right, where causal attention never looks: they need no attention mask, and attention
takes its fast path (trials.try_batches finds those that do look). Logits are made at columns where some row
trains on the next token, so not for prompts.

Shapes: B rows, T tokens, C columns with logits, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from ads import chat
from ads.chat import IGNORED_LABEL
from ads.data.problems import take_subset
from ads.data.tables import check_traces, read_parquet
from ads.stage.errors import UserError

MAX_PADDING = 0.05  # of a batch's tokens


@dataclass(frozen=True)
class Sequence:
    """A holdout trace as token ids; the first num_prompt_tokens are not trained on."""

    ids: list[int]
    num_prompt_tokens: int


def make_sequences(rows, max_length):
    """The Sequence of each trace row, cut to max_length; none where that leaves no response token."""
    sequences = [
        Sequence((row["prompt_ids"] + row["response_ids"])[:max_length], len(row["prompt_ids"]))
        for row in rows
    ]
    return [s for s in sequences if len(s.ids) > s.num_prompt_tokens > 0]


def load_sequences(path, max_length, max_samples=None, seed=0):
    """(the Sequence of each row of a trace dataset, how many had no room for a response token)."""
    rows = read_parquet(path)
    check_traces(path, rows, ids=("prompt_ids", "response_ids"))
    rows = take_subset(rows, max_samples, seed)
    kept = make_sequences(rows, max_length)
    if not kept:
        raise UserError(f"{path}: no response token within max_length={max_length}")
    return kept, len(rows) - len(kept)


def length_of(sequence):
    return len(sequence.ids)


def make_batches(sequences, batch_size, batch_tokens=math.inf, length=length_of):
    """Lists of at most batch_size sequences of like lengths, longest first; length: of one, in tokens.

    A batch ends before more than MAX_PADDING of it would be padding, or where it would have more than
    batch_tokens tokens, padding included; a longer sequence stands alone.
    """
    batches = []
    for s in sorted(sequences, key=length, reverse=True):
        batch = batches[-1] if batches else []
        tokens = sum(map(length, [*batch, s]))
        padded = (len(batch) + 1) * length((batch or [s])[0])
        is_full = len(batch) == batch_size or padded > batch_tokens
        if not batch or is_full or tokens < (1 - MAX_PADDING) * padded:
            batches.append([s])
        else:
            batch.append(s)
    return batches


def sequence_losses(model, sequences):
    """Mean negative log-likelihood (nats/token, float32, (B,)) of each sequence's response tokens."""
    examples = [
        {
            "input_ids": s.ids,
            "labels": [chat.IGNORED_LABEL] * s.num_prompt_tokens + s.ids[s.num_prompt_tokens :],
        }
        for s in sequences
    ]
    device = model.get_input_embeddings().weight.device
    batch = {key: tensor.to(device) for key, tensor in collate(examples).items()}
    labels_BT = batch.pop("labels")
    losses_BC = token_losses(model(**batch, use_cache=False).logits, labels_BT)
    return losses_BC.sum(1) / (labels_BT != chat.IGNORED_LABEL).sum(1)


@torch.no_grad()
def mean_loss(model, sequences, num_total, batch_size, batch_tokens=math.inf):
    """This process's share of the mean loss (nats/token) over num_total sequences."""
    batches = make_batches(sequences, batch_size, batch_tokens)
    return sum(sequence_losses(model, batch).sum().item() for batch in batches) / num_total


def collate(examples, pad_id=0):
    """What a model takes, of dicts with input_ids and labels: both (B, T), and logits_to_keep (C,), int64."""
    width = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad_id, "labels": IGNORED_LABEL}
    batch = {
        key: torch.tensor([example[key] + [value] * (width - len(example[key])) for example in examples])
        for key, value in fill.items()
    }
    return batch | {"logits_to_keep": columns_before_labels(batch["labels"])}


def columns_before_labels(labels_BT):
    """The columns (C,) after which some row has a token to train on."""
    return (labels_BT[:, 1:] != IGNORED_LABEL).any(0).nonzero().squeeze(1)


def token_losses(logits_BCV, labels_BT):
    """Negative log-likelihoods (nats, float32, (B, C)) of the labels; 0 where a row has none.

    logits_BCV: a model's output for a batch of `collate`.
    """
    columns_C = columns_before_labels(labels_BT)
    targets_BC = labels_BT[:, 1:][:, columns_C]
    if logits_BCV.shape[1] == labels_BT.shape[1]:  # a model that does not know logits_to_keep
        logits_BCV = logits_BCV[:, columns_C]
    assert logits_BCV.shape[:2] == targets_BC.shape, (logits_BCV.shape, targets_BC.shape)
    # rows and columns as one: (B, V, C), which the library also takes, is far slower
    losses_N = torch.nn.functional.cross_entropy(
        logits_BCV.float().flatten(0, 1), targets_BC.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses_N.view(targets_BC.shape)
