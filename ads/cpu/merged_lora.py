"""LoRA adapters (Hu et al., 2021) trained by the merged weights M = W + s B A.

    with merged_adapters(model):
        trainer.train()

PEFT computes y = x W^T + s (x A^T) B^T and differentiates each product. Here y = x M^T and dx = dy M, one
product each; dA = s (dy B)^T x and dB = s dy^T (x A^T) as before. M is made once between two steps of an
optimizer and kept meanwhile: one more copy of the adapted weights, and fewer operations where a process has
more than I O / (I + O) tokens between steps. In float32 results are PEFT's to rounding. In bfloat16 the sum
would lose what adapters learn: such layers are left to PEFT, and so are those with more to them (dropout).

Shapes: R rows, I inputs, O outputs, K rank.
"""

import contextlib
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook


@contextlib.contextmanager
def merged_adapters(model: torch.nn.Module):
    """A context in which the model's layers with an adapter compute by M: those of float32 on a CPU.

    Within it adapters stay on, and change only by steps of a torch.optim.Optimizer.
    """
    layers = {layer: MergedLayer(layer) for layer in model.modules() if is_plain_float32(layer)}
    hook = register_optimizer_step_post_hook(functools.partial(forget, list(layers.values())))
    for layer, forward in layers.items():
        layer.forward = forward
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            del layer.forward


def forget(layers, *_):
    """Drop each M: an optimizer has changed the adapters."""
    for layer in layers:
        layer.merged_OI = None


def is_plain_float32(layer):
    """Whether all that a module does is y = x W^T + b + s (x A^T) B^T, float32 on a CPU."""
    from peft.tuners.lora.layer import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear:
        return False
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or layer.merged or layer.disable_adapters:
        return False
    a, b, dropout = (parts[names[0]] for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    is_plain = type(dropout) is torch.nn.Identity and b.bias is None and names[0] not in layer.lora_variant
    weights = layer.base_layer.weight, a.weight, b.weight
    are_float = all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
    return is_plain and are_float and not layer.base_layer.weight.requires_grad


class MergedLayer:
    """Instead of the forward of a PEFT layer with one adapter."""

    def __init__(self, layer):
        (name,) = layer.active_adapters
        self.base = layer.base_layer
        self.a_KI, self.b_OK = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.scaling = layer.scaling[name]
        self.merged_OI = None

    def __call__(self, x):
        """(..., O) of (..., I)."""
        assert x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"), "float32 alone"
        if self.merged_OI is None:
            a_KI, b_OK = self.a_KI.detach(), self.b_OK.detach()
            self.merged_OI = torch.addmm(self.base.weight.detach(), b_OK, a_KI, alpha=self.scaling)
        x_RI = x.reshape(-1, x.shape[-1])
        y_RO = MergedLinear.apply(x_RI, self.merged_OI, self.a_KI, self.b_OK, self.scaling)
        y = y_RO.view(*x.shape[:-1], y_RO.shape[-1])
        return y if self.base.bias is None else y + self.base.bias


class MergedLinear(torch.autograd.Function):
    """x M^T, whose derivatives are those by x, A and B; M is a constant to autograd."""

    @staticmethod
    def forward(ctx, x_RI, merged_OI, a_KI, b_OK, scaling):
        ctx.save_for_backward(x_RI, merged_OI, a_KI, b_OK)
        ctx.scaling = scaling
        return x_RI @ merged_OI.T

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RO):
        x_RI, merged_OI, a_KI, b_OK = ctx.saved_tensors
        dx_RI = dy_RO @ merged_OI if ctx.needs_input_grad[0] else None
        inner_RK = (x_RI @ a_KI.T).mul_(ctx.scaling)
        d_inner_RK = (dy_RO @ b_OK).mul_(ctx.scaling)
        return dx_RI, None, d_inner_RK.T @ x_RI, dy_RO.T @ inner_RK, None
