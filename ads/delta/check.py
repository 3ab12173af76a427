"""Whether dual numbers give a model's derivatives as backpropagation does: tried on a few tokens."""

import functools

import torch

from ads.dual.factors import Factors
from ads.dual.model import DualModel
from ads.dual.rules import halves
from ads.stage import errors
from ads.stage.errors import UserError
from ads.trials import TRIED, is_out_of_memory, tried_ids


def make_checked(model, read_gradient):
    """DualModel(model, read_gradient), once a few tokens show that it is right.

    Its values must be the model's, its derivatives those of reverse-mode AD: for logits z and random weights
    c, the derivative of c z along g is the sum over parameters of (gradient of c z) g, which is the
    dot-product test of derivatives (Claerbout, 1992). Else ValueError in one line. The cost is a forward and
    a backward pass of TRIED tokens and reading g once; gradients are held one parameter at a time.
    """
    kind, table = model.config.model_type, model.get_input_embeddings().weight
    ids_1T = torch.tensor([tried_ids(model, TRIED)], device=table.device)
    try:
        logits_V, weights_V, wanted = reverse(model, read_gradient, ids_1T)
        dual_model = DualModel(model, read_gradient)
        values_V, changes_V = halves(dual_model(ids_1T, use_cache=False).logits.as_subclass(torch.Tensor))
        values_V, changes_V = values_V[0, -1].float(), changes_V[0, -1].float()
    except Exception as error:  # whatever a family's operations raise that are not covered
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the exact Delta does not cover model type {kind!r} ({errors.reason(error)}): set eps above 0"
        ) from error
    slack = 1e-3 if table.dtype == torch.float32 else 0.5
    is_right = (values_V - logits_V).norm() <= slack * (logits_V - logits_V.mean()).norm()
    is_right &= (weights_V @ changes_V - wanted).abs() <= slack * changes_V.norm()
    if logits_V.isfinite().all() and wanted.isfinite() and not is_right:
        raise UserError(
            f"the exact Delta of model type {kind!r} is not the derivative that backpropagation gives: "
            "set eps above 0"
        )
    return dual_model


def reverse(model, read_gradient, ids_1T):
    """(logits z after the last id, random weights c, derivative of c z along g by backpropagation)."""
    kept, dots = [(p, p.grad, p.requires_grad) for p in model.parameters()], []
    for p, *_ in kept:
        p.grad = None
        p.requires_grad_(p.is_floating_point())
    hooks = [
        p.register_post_accumulate_grad_hook(functools.partial(take_dot, dots, read_gradient, name))
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    with torch.inference_mode(False), torch.enable_grad():
        logits_V = model(input_ids=ids_1T, use_cache=False).logits[0, -1].float()
        weights_V = torch.randn(len(logits_V), generator=torch.Generator().manual_seed(0)).to(logits_V)
        (weights_V @ logits_V).backward()
    for hook in hooks:
        hook.remove()
    for p, grad, requires_grad in kept:
        p.requires_grad_(requires_grad)
        p.grad = grad
    return logits_V.detach(), weights_V, torch.stack(dots).sum()


def take_dot(dots, read_gradient, name, parameter):
    """Add a parameter's share of a derivative along g, and give its gradient's room back."""
    grad, g = parameter.grad.float(), read_gradient(name).to(parameter.device)
    parameter.grad = None
    if isinstance(g, Factors):
        dots.append(((g.left.float().T @ grad) * g.right.float()).sum())
    else:
        dots.append((grad * g.float()).sum())
