"""LoRA adapters (Hu et al., 2021) trained by the merged weights M = W + s B A.

    with lora.merged(model):
        trainer.train()

PEFT computes y = x W^T + s (x A^T) B^T and differentiates each product. Here y = x M^T and dx = dy M, one
product each; dA = s (dy B)^T x and dB = s dy^T (x A^T) as before. M is made once between two steps of an
optimizer and kept meanwhile: one more copy of the adapted weights, and fewer operations where a process has
more than I O / (I + O) tokens between steps. In float32 results are PEFT's to rounding. In bfloat16 the sum
would lose what adapters learn: such layers are left to PEFT, and so are those with more to them (dropout).

What PEFT cannot adapt, or merges into other logits than those that were trained, is refused before training.

Shapes: R rows, I inputs, O outputs, K rank, T tokens, V vocabulary.
"""

import contextlib
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from ads import decoder, dual, matmul, models
from ads.stage import errors

FILLING = 0.3  # what adapters that are tried out add to a layer's output, about


def add_adapters(model, cfg):
    """The model with adapters on all its linear layers, as PEFT makes them, tried out.

    cfg: the TrainConfig. ValueError for a model that adapters cannot be trained in and merged into.
    """
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    kind = model.config.model_type
    try:
        model = get_peft_model(model, settings)
        beside_TV, merged_TV = try_out(model)
    except Exception as error:  # whatever PEFT raises for modules, and modules for being replaced
        if dual.is_out_of_memory(error):
            raise
        problem = f"adapters do not work in a {kind!r} model ({errors.reason(error)})"
        raise ValueError(f"student {cfg.student}: {problem}; set lora=false") from error
    if not decoder.agrees(merged_TV, beside_TV):
        problem = f"adapters cannot be merged into the weights of a {kind!r} model: its logits would change"
        raise ValueError(f"student {cfg.student}: {problem}; set lora=false")
    return model


def try_out(model):
    """Logits (T, V) of a few tokens by adapters that do something, beside the weights and merged into them.

    The model is then as it was.
    """
    ids = dual.tried_ids(model, dual.TRIED)
    with float32_copies(model):
        fill_(model)
        beside_TV = logits(model, ids)
        model.merge_adapter()
        merged_TV = logits(model, ids)
        model.unmerge_adapter()
    return beside_TV, merged_TV


@torch.no_grad()
def fill_(model):
    """Put random numbers for the zeros that adapters begin with."""
    from peft.tuners.lora import LoraLayer

    generator = torch.Generator().manual_seed(0)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        for name, b in layer.lora_B.items():
            drawn_OK = torch.randn(b.weight.shape, generator=generator)
            b.weight.copy_(drawn_OK * FILLING / (layer.scaling[name] * layer.r[name] ** 0.5))


@contextlib.contextmanager
def float32_copies(model):
    """A context in which a model computes with float32 copies of its weights, which may be changed."""
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    for tensor, data in kept:
        if data.is_floating_point():
            tensor.data = data.to(torch.float32, copy=True)
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def merge(model, rows):
    """The trained model in float32, its adapters merged into its weights.

    rows: a few lists of token ids. ValueError if merging changes their logits.
    """
    model = model.float()
    beside = [logits(model, ids) for ids in rows]
    model = model.merge_and_unload()
    for ids, beside_TV in zip(rows, beside, strict=True):
        if not decoder.agrees(logits(model, ids), beside_TV):
            kind = model.config.model_type
            raise ValueError(f"merging the adapters changed the {kind!r} model's logits: set lora=false")
    return model


@torch.no_grad()
def logits(model, ids):
    """Logits (T, V) of one row, by a model in float32, which flash attention does not know."""
    library, was_training = next(m for m in model.modules() if isinstance(m, PreTrainedModel)), model.training
    attention = library.config._attn_implementation
    if "flash" in attention:
        library.set_attn_implementation("eager")
    logits_TV = models.logits_of(model.eval(), ids)
    if "flash" in attention:
        library.set_attn_implementation(attention)
    model.train(was_training)
    return logits_TV


@contextlib.contextmanager
def merged(model):
    """A context in which the model's layers with an adapter compute by M: those of float32 on a CPU.

    Within it adapters stay on, and change only by steps of a torch.optim.Optimizer.
    """
    layers = {layer: MergedLayer(layer) for layer in model.modules() if suits(layer)}
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


def suits(layer):
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
        return matmul.multiplier(x_RI, merged_OI)(x_RI, merged_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_RO):
        x_RI, merged_OI, a_KI, b_OK = ctx.saved_tensors
        for_x = ctx.needs_input_grad[0]
        dx_RI = matmul.multiplier(dy_RO, merged_OI)(dy_RO, merged_OI) if for_x else None
        # of K columns: too thin for tiles
        inner_RK = (x_RI @ a_KI.T).mul_(ctx.scaling)
        d_inner_RK = (dy_RO @ b_OK).mul_(ctx.scaling)
        return dx_RI, None, d_inner_RK.T @ x_RI, dy_RO.T @ inner_RK, None
