"""The loss of stages 2 and 4: -log p of the tokens that are trained on, and logits of hardly any others.

Rows are padded on the right, where causal attention never looks: they need no attention mask, and attention
takes its fast path (models.try_batches finds those that do look). Logits are made at columns where some row
trains on the next token, so not for prompts.

Shapes: B rows, T tokens, C columns with logits, V vocabulary.
"""

import torch

from ads.chat import IGNORED_LABEL


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
