"""What the undistilled student makes of traces: how likely it finds them, what learning them would do to it.

In its chat format, as `distill.py` trains it. Shapes: T tokens, N labels.
"""

import math

import torch

from ads import chat
from ads.data.examples import num_labels, num_tokens
from ads.delta import gradient
from ads.delta.loss import Sequence, collate, make_batches, token_losses
from ads.loading import load_model, resolve_dtype
from ads.stage.errors import UserError
from ads.stage.world import print0
from ads.trials import try_batches

DIGITS = 4  # of nats that are kept: what is beyond hangs on how rows are batched


def batches_of(examples, batch_size, batch_tokens):
    """Batches of examples, dicts with input_ids and labels, as lists of their places."""
    lengths = list(map(num_tokens, examples))
    return make_batches(range(len(examples)), batch_size, batch_tokens, length=lengths.__getitem__)


def label_losses(model, examples, batch_size=8, batch_tokens=2048, progress=iter):
    """[-log p (nats, float32, (N,), on the CPU) of each example's labels, in their order].

    examples: dicts with input_ids and labels, as of `load_examples`. The model is left as it is.
    """
    losses = [torch.zeros(0)] * len(examples)
    for batch in progress(batches_of(examples, batch_size, batch_tokens)):
        for i, found in zip(batch, losses_of(model, [examples[i] for i in batch]), strict=True):
            losses[i] = found
    return losses


@torch.no_grad()
def losses_of(model, examples):
    """`label_losses` of one batch."""
    if not any(map(num_labels, examples)):
        return [torch.zeros(0)] * len(examples)
    batch, labels_BT = to_device(model, examples)
    losses_BC = token_losses(model(**batch, use_cache=False).logits, labels_BT)
    columns_C = batch["logits_to_keep"] + 1
    are_labels_BC = labels_BT[:, columns_C] != chat.IGNORED_LABEL
    rounded_BC = torch.round(losses_BC, decimals=DIGITS).cpu()
    return [row_C[are_C] for row_C, are_C in zip(rounded_BC, are_labels_BC.cpu(), strict=True)]


def to_device(model, examples):
    device = model.get_input_embeddings().weight.device
    batch = {key: tensor.to(device) for key, tensor in collate(examples).items()}
    return batch, batch.pop("labels")


def load_student(cfg, tokenizer, longest, device, dtype):
    """The undistilled student, tried out on batches of up to `longest` tokens."""
    print0(f"loading {cfg.student}")
    model = load_model(cfg.student, dtype, device, cfg.attn_implementation)
    chat.check_rows(tokenizer, model.get_input_embeddings().weight.shape[0], cfg.student)
    try_batches(model, longest, resolve_dtype(dtype, device))
    return model


def mean_nll(model, examples):
    """The NLL (nats/token) of each example of one batch; inf of one without a label: it teaches nothing."""
    return [round(x_N.mean().item(), DIGITS) if len(x_N) else math.inf for x_N in losses_of(model, examples)]


def loss_gradient(model, examples, batch_size, batch_tokens, progress=iter):
    """[g of each parameter], the gradient of the mean loss over examples, as distill.py evaluates it.

    Each process computes all of it, in the same batches: shares of several would add up to other last digits.
    """
    sequences = [Sequence(e["input_ids"], num_tokens(e) - num_labels(e)) for e in examples]
    gradient.add_gradient_(model, sequences, len(sequences), batch_size, progress, batch_tokens)
    gradient.norms(model)  # that are finite, and not all 0
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def derivatives(model, gradients, examples):
    return [derivative(model, gradients, example) for example in examples]


def derivative(model, gradients, example):
    """How fast the loss rises along an example: the sum over its labels of <g, gradient of log p(label)>.

    gradients: of `loss_gradient`. float32; sums of products over a parameter, float64 over all.
    """
    if not num_labels(example):
        return 0.0
    batch, labels_1T = to_device(model, [example])
    loss = token_losses(model(**batch, use_cache=False).logits, labels_1T).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    pairs = [(g, h) for g, h in zip(gradients, found, strict=True) if g is not None and h is not None]
    total = -sum(torch.dot(g.flatten(), h.flatten()).double() for g, h in pairs).item()
    if not math.isfinite(total):
        raise UserError("the derivative along a trace is not finite: check the student's weights")
    return float(f"{total:.5g}")
