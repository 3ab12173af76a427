"""A causal language model in dual numbers: each activation with its derivative along g, one set of weights.

torch's forward-mode AD takes the derivative of whatever the library's forward does, so any causal LM will do:
norms, rotary embeddings, activations, gates, soft caps, residuals. Only what reads much memory is written
out:

    linear layer   y = W x + b   [W x; W dx] is one product of twice the rows, so W is read once;
                                 dy = W dx + dW x + db, where dW x is two thin products if dW = left right
    embedding      y = E[i]      dy = dE[i], made for the rows asked for alone
    attention      y = P v       keys and values lie in two caches; each is read once for value and derivative

(Stacking [x; dx] by hand in a tensor subclass would save some copies, and need a rule for each operation of
each architecture.)

Two facts about torch.autograd.forward_ad: inference mode drops derivatives without a word, hence
`derivatives`; and make_dual copies the tangent unless it is laid out as the value is, storage included, which
the two caches are.

Shapes: B rows, T tokens given, L positions attended to, H heads of queries, K of keys, G = H / K, D head
width, I and O a linear layer's inputs and outputs, N = B T.
"""

import contextlib
import functools

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn.functional import embedding, linear
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from ads.gradient import Factors, dense
from ads.models import SlotCache

ATTENTION = "dual"
SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
PRODUCTS = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
# what some architectures add to the scores, which dual_attention does not
NOT_COVERED = ("s_aux", "sinks", "position_bias", "block_indices", "indices")


@contextlib.contextmanager
def derivatives():
    """Where dual tensors can be made and keep their tangents."""
    with torch.inference_mode(False), torch.no_grad(), dual_level():
        yield


class DualModel:
    """Called like the model that it takes over, within `derivatives`; then its logits are dual.

    read_gradient(name) is g of a parameter, a tensor or Factors; it is kept in the parameter's dtype. With
    attn_implementation "eager" attention stays the library's: slower, of any kind.
    """

    def __init__(self, model, read_gradient):
        self.model, self.config = model, model.config
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation(ATTENTION)
        # by identity, as tied weights have one name and several owners
        tangents = {id(p): read_gradient(name).to(p) for name, p in model.named_parameters()}
        replace_modules_(model, tangents)
        self.others = {
            f"{prefix}.{name}": (p.detach(), dense(tangents[id(p)]))
            for prefix, module in model.named_modules()
            if not isinstance(module, DualLinear | DualEmbedding)
            for name, p in module.named_parameters(recurse=False)
        }

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def __call__(self, **inputs):
        duals = {name: make_dual(*pair) for name, pair in self.others.items()}
        return torch.func.functional_call(self.model, duals, (), inputs, tie_weights=False)


def replace_modules_(model, tangents):
    """Put dual modules in the place of linear layers and embeddings; tangents: {id of a parameter: g}.

    Other modules without children are called through `call_leaf`.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear or type(child) is Conv1D:
                setattr(parent, name, DualLinear(child, tangents))
            elif isinstance(child, torch.nn.Embedding):
                setattr(parent, name, DualEmbedding(child, tangents))
            elif not list(child.children()):
                child.forward = functools.partial(call_leaf, child.forward)


class Numbers(TorchFunctionMode):
    """Sums and products of a dual tensor and a number, without the symbolic zero for the number's derivative.

    torch makes one, which costs 0.1-0.3 ms a time on the host (torch 2.13).
    """

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if keywords or (function not in SUMS and function not in PRODUCTS):
            return function(*arguments, **(keywords or {}))
        (x, dx), number = unpack_dual(arguments[0]), arguments[1]
        if dx is None or not isinstance(number, float | int):
            return function(*arguments)
        if function in SUMS:
            return make_dual(x + number, dx.clone())  # a copy, as either may be changed in place
        return make_dual(x * number, dx * number)


def call_leaf(forward, *inputs, **keywords):
    """Call a module of no modules, such as a norm, an activation or the rotary angles."""
    with Numbers():
        output = forward(*inputs, **keywords)
    return tuple(map(with_tangent, output)) if isinstance(output, tuple) else with_tangent(output)


def with_tangent(tensor):
    """A constant of the pass as a dual tensor, again as a symbolic zero costs more than zeros."""
    if not tensor.is_floating_point() or unpack_dual(tensor).tangent is not None:
        return tensor
    return make_dual(tensor, torch.zeros_like(tensor))


class DualLinear(torch.nn.Module):
    """A linear layer: dual (..., I) to dual (..., O)."""

    def __init__(self, module, tangents):
        super().__init__()
        self.weight, self.bias = module.weight, module.bias
        self.is_transposed = type(module) is Conv1D  # weight (I, O)
        g = tangents[id(module.weight)]
        self.g_OI = g.T if self.is_transposed else g
        self.g_bias_O = None if module.bias is None else tangents[id(module.bias)]

    def forward(self, x):
        weight_OI = self.weight.T if self.is_transposed else self.weight
        x, dx = unpack_dual(x)
        rows_NI = torch.cat([x, dx]).flatten(0, -2)
        value_NO, tangent_NO = linear(rows_NI, weight_OI).chunk(2)
        add_product_(tangent_NO, rows_NI[: len(value_NO)], self.g_OI)
        if self.bias is not None:
            value_NO += self.bias
            tangent_NO += self.g_bias_O
        shape = (*x.shape[:-1], -1)
        return make_dual(value_NO.view(shape), tangent_NO.view(shape))


def add_product_(target_NO, x_NI, g_OI):
    """target += x g^T, for g as it is or in factors."""
    if isinstance(g_OI, Factors):
        return target_NO.addmm_(x_NI @ g_OI.right.T, g_OI.left.T)
    return target_NO.addmm_(x_NI, g_OI.T)


class DualEmbedding(torch.nn.Module):
    """An embedding of any subclass (some scale what they read): ids to dual rows."""

    def __init__(self, module, tangents):
        super().__init__()
        self.weight, self.g = module.weight, tangents[id(module.weight)]
        del module.weight
        module.padding_idx = None  # concerns training alone, and has to be below the number of rows
        self.module = module

    def forward(self, ids):
        ids_N = ids.flatten()
        if isinstance(self.g, Factors):
            tangent_ND = embedding(ids_N, self.g.left) @ self.g.right
        else:
            tangent_ND = embedding(ids_N, self.g)
        self.module.weight = make_dual(embedding(ids_N, self.weight), tangent_ND)
        return self.module(torch.arange(len(ids_N), device=ids.device).view_as(ids))


class DualCache(SlotCache):
    """Keys and values as a SlotCache holds them, their tangents in another one."""

    def __init__(self, num_slots, num_positions):
        super().__init__(num_slots, num_positions)
        self.tangents = SlotCache(num_slots, num_positions)

    def update(self, keys_BKTD, values_BKTD, layer_idx, *args, **kwargs):
        keys, values = unpack_dual(keys_BKTD), unpack_dual(values_BKTD)
        self.tangents.placement = self.placement
        seen = super().update(keys.primal, values.primal, layer_idx)
        d_seen = self.tangents.update(keys.tangent, values.tangent, layer_idx)
        return tuple(make_dual(*pair) for pair in zip(seen, d_seen, strict=True))

    def move(self, source, target, length):
        super().move(source, target, length)
        self.tangents.move(source, target, length)


def log_probs(logits_BV, tangents_BV):
    """Log-probabilities (nats) and their derivative, each (B, V), of float32 logits and theirs.

    d log p(x) = dz(x) - sum over y of p(y) dz(y), for logits z.
    """
    log_probs_BV = torch.log_softmax(logits_BV, -1)
    probs_BV = log_probs_BV.exp()
    for _ in range(2):  # what all logits share is large and rounds; the second time the rest of it goes
        tangents_BV = tangents_BV - (probs_BV * tangents_BV).sum(-1, keepdim=True)
    return log_probs_BV, tangents_BV


def dual_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **others
):
    """softmax(softcap(scaling q k^T) + mask) v of dual queries (B, H, T, D), keys and values (B, K, L, D).

    Returns dual (B, T, H, D) and None. The mask (B, 1, T, L) is added to the scores; softmax is float32.
    """
    check_covered(attention_mask, others)
    q, dq = unpack_dual(query)
    (k, dk), (v, dv) = unpack_dual(key), unpack_dual(value)
    num_rows, num_heads, num_tokens, width = q.shape
    num_groups = num_heads // k.shape[1]
    # the heads that share keys are rows of one product, above those of their tangents
    shape = (num_rows, k.shape[1], num_groups * num_tokens, width)
    queries = torch.cat([q.reshape(shape), dq.reshape(shape)], dim=2) * (scaling or width**-0.5)
    scores, d_scores = (queries @ k.mT).float().chunk(2, dim=2)
    d_scores += queries[:, :, : shape[2]] @ dk.mT
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, d_scores = softcap * capped, d_scores * (1 - capped**2)
    grouped = scores.unflatten(2, (num_groups, num_tokens)) + attention_mask[:, :, None]
    probs = torch.softmax(grouped.flatten(2, 3), dim=-1)
    d_probs = probs * d_scores
    d_probs -= probs * d_probs.sum(-1, keepdim=True)
    both = torch.cat([probs, d_probs], dim=2).to(v.dtype)
    output = both @ v
    output[:, :, shape[2] :] += both[:, :, : shape[2]] @ dv
    # (B, K, 2, G, T, D) to 2 of (B, T, H, D)
    output = output.unflatten(2, (2, num_groups, num_tokens)).permute(2, 0, 4, 1, 3, 5).flatten(3, 4)
    return make_dual(output[0].contiguous(), output[1].contiguous()), None


def check_covered(attention_mask, others):
    unknown = [name for name in NOT_COVERED if others.get(name) is not None]
    if unknown:
        raise ValueError(
            f"the proxy's attention takes {', '.join(unknown)}, which the exact derivative does not cover: "
            "set attn_implementation=eager, or an eps above 0"
        )
    assert attention_mask is not None, "a mask is always made: see eager_mask"


AttentionInterface.register(ATTENTION, dual_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
