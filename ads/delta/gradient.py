"""The proxy gradient: g, the gradient of the proxy's loss on clean holdout traces.

    l(theta) = mean over sequences of (mean over response tokens of -log p(token)), in nats, float32

Shapes: B rows, T tokens, V vocabulary.
"""

import math

import torch

from ads.delta.loss import make_batches, sequence_losses
from ads.dual.factors import factorise, saves_room
from ads.stage.errors import UserError


def compress(model, rank, seed, is_share=False):
    """{parameter name: its gradient}: Factors of at most `rank` where that takes less room, else the tensor.

    float32, on the model's device. rank 0 keeps everything whole, which is no copy. is_share: what the
    processes hold is summed, one parameter at a time, into a copy.
    """
    compressed = {}
    for name, p in model.named_parameters():
        g = (torch.zeros_like(p) if p.grad is None else p.grad).float()
        if is_share:
            g = g.clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(g)
        compressed[name] = factorise(g, rank, seed, name) if saves_room(g.shape, rank) else g
    return compressed


def add_gradient_(
    model, sequences, num_total, batch_size, progress=iter, batch_tokens=math.inf, dtype="float32"
):
    """Add this process's share of the mean gradient to the parameters' .grad; returns its share of the mean
    loss.

    num_total is the number of sequences over all processes. dtype is that of the passes' matrix products;
    weights and .grad stay float32.
    """
    device = model.get_input_embeddings().weight.device.type
    loss = 0.0
    for batch in progress(make_batches(sequences, batch_size, batch_tokens)):
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            share = sequence_losses(model, batch).sum() / num_total
        share.backward()
        loss += share.item()
    return loss


def all_reduce_(model):
    """Sum the gradients over all processes, once."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)


@torch.no_grad()
def descend_(model, step_length):
    """One step of gradient descent, `step_length` long, along the parameters' .grad."""
    factor = step_length / total_norm(norms(model))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter -= factor * parameter.grad


def norms(model):
    """{parameter name: Euclidean norm of its gradient}; ValueError if any is not finite or all are zero."""
    found = finite_norms(model)
    if not any(found.values()):
        raise UserError("the gradient is zero: no response token of the holdout traces reached the loss")
    return found


def finite_norms(model):
    """As `norms`, where the gradient may be zero, such as that of a process that had no sequences."""
    found = {
        name: 0.0 if p.grad is None else p.grad.norm(dtype=torch.float64).item()
        for name, p in model.named_parameters()
    }
    bad = [name for name, norm in found.items() if not math.isfinite(norm)]
    if bad:
        raise UserError(
            f"the gradient of {bad[0]} (and {len(bad) - 1} more) is not finite: check the proxy's weights"
        )
    return found


def total_norm(norms_by_name):
    return math.sqrt(sum(norm**2 for norm in norms_by_name.values()))
