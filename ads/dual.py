"""A causal language model in dual numbers: each activation with its derivative along g, one set of weights.

The library's own forward runs on tensors that hold values and derivatives one above the other:

    Dual, (2B, ...)      rows 0..B-1: values x              rows B..2B-1: derivatives dx
    Weight               a parameter W                       its `tangent` dW, a tensor or Factors

Reshaping, adding, scaling by constants treat all rows alike and run as they are, once. Few operations need
more (RULES):

    linear layer   y = W x + b   [W x; W dx] is one product of twice the rows, so W is read once;
                                 dy = W dx + dW x + db, where dW x is two thin products if dW = left right
    embedding      y = E[i]      dy = dE[i], made for the rows asked for alone
    product        z = x y       dz = x dy + y dx; and powers and roots of norms
    attention      y = P v       keys and values, each read once for value and derivative

All others (softmax, layer norm, activations, soft caps, ...) are differentiated by torch's forward-mode AD,
one operation at a time; `make_checked` finds out whether that is right. (The whole forward under forward-mode
AD is the rival: less code and, when decoding, twice the time beside the linear layers, most of it on the
host.)

Shapes: B rows, T tokens given, L positions attended to, H heads of queries, K of keys, G = H / K, D head
width, I and O a linear layer's inputs and outputs, N = B T.
"""

import functools

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ads import native
from ads.cache import Placement, SlotCache
from ads.gradient import Factors, dense
from ads.stage import errors

ATTENTION = "dual"
IN_PLACE = ("__iadd__", "add_", "__isub__", "sub_")
TRIED = 24  # tokens of the row that derivatives are tried with
# what some architectures add to the scores, which dual_attention does not
NOT_COVERED = ("s_aux", "sinks", "position_bias", "block_indices", "indices")


class Dual(torch.Tensor):
    """Values in the first half of the rows (dimension 0), their derivatives in the second."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        with torch._C.DisableTorchFunctionSubclass():
            return apply(function, arguments, keywords or {})


class Weight(torch.Tensor):
    """A parameter; `tangent`, a tensor or Factors, is its derivative.

    extended: the rows of the right factor below those of the parameter, of which this is a view; or None.
    """

    extended = None
    __torch_function__ = Dual.__torch_function__


class DualModel:
    """Called like the model that it takes over; then its logits are Dual.

    read_gradient(name) is g of a parameter, a tensor or Factors; it is kept in the parameter's dtype. With
    attn_implementation "eager" attention stays the library's: slower, of any kind.
    """

    def __init__(self, model, read_gradient):
        self.library, self.config = model, model.config
        if model.config._attn_implementation != "eager":
            model.set_attn_implementation(ATTENTION)
        norms = find_norms(model)
        # by identity, as tied weights have one name and several owners
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        weights = {
            id(p): own_weight(p, read_gradient(name), id(p) in tables) for name, p in model.named_parameters()
        }
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, weights[id(p)])
        for module, offset, eps in norms:
            module.forward = functools.partial(apply_norm, scale(module.weight, offset), eps)

    def get_input_embeddings(self):
        return self.library.get_input_embeddings()

    def make_cache(self, make_storage, num_slots, num_positions):
        gives_pairs = self.config._attn_implementation == ATTENTION
        return DualCache(make_storage, num_slots, num_positions, gives_pairs)

    def __call__(self, input_ids, attention_mask=None, past_key_values=None, **inputs):
        if past_key_values is not None:
            past_key_values.double_placement(len(input_ids))
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" not in inputs:  # the library's own would be one row, of no derivative
            inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
            inputs["position_ids"] = inputs["position_ids"].expand_as(input_ids)
        inputs = {name: twice(value) for name, value in inputs.items()}
        # forward-mode AD drops derivatives without a word in inference mode
        with torch.inference_mode(False), torch.no_grad():
            return self.library(past_key_values=past_key_values, **inputs)


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
        raise ValueError(
            f"the exact Delta does not cover model type {kind!r} ({errors.reason(error)}): set eps above 0"
        ) from error
    slack = 1e-3 if table.dtype == torch.float32 else 0.5
    is_right = (values_V - logits_V).norm() <= slack * (logits_V - logits_V.mean()).norm()
    is_right &= (weights_V @ changes_V - wanted).abs() <= slack * changes_V.norm()
    if logits_V.isfinite().all() and wanted.isfinite() and not is_right:
        raise ValueError(
            f"the exact Delta of model type {kind!r} is not the derivative that backpropagation gives: "
            "set eps above 0"
        )
    return dual_model


def tried_ids(model, number):
    """A list of token ids to try a model with: none of the padding, which backpropagation leaves out."""
    table = model.get_input_embeddings()
    ids = (torch.arange(2 * number + 1) * 7919 % len(table.weight)).tolist()
    return [i for i in ids if i != getattr(table, "padding_idx", None)][:number]


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


def own_weight(parameter, tangent, is_table):
    """The Weight of a parameter of the model; is_table: rows are read from it."""
    tangent = tangent.to(parameter)
    if not isinstance(tangent, Factors):
        parameter.data = parameter.data.clone()  # no longer a view of the file, so that it can be closed
        return make_weight(parameter, tangent.clone() if tangent.dim() == 1 else tangent)
    rows = [parameter.detach(), tangent.right]
    extended = torch.cat(rows) if is_table else stack_rows(rows)
    parameter.data = extended[: len(parameter)]  # frees the first copy
    weight = make_weight(parameter, Factors(tangent.left, extended[len(parameter) :]))
    weight.extended = extended
    return weight


def stack_rows(matrices):
    """Matrices one above the other, in the layout by which few rows are multiplied fastest.

    On the CPU in float32 that is by rows where native.c decodes, else by columns, in torch a tenth faster
    (bench/RESULTS.md).
    """
    stacked = new_matrix(matrices[0], sum(map(len, matrices)), matrices[0].shape[1])
    for part, matrix in zip(stacked.split([len(m) for m in matrices]), matrices, strict=True):
        part.copy_(matrix)
    return stacked


def stack_columns(matrices):
    """Matrices side by side, in that layout."""
    widths = [m.shape[1] for m in matrices]
    stacked = new_matrix(matrices[0], len(matrices[0]), sum(widths))
    for part, matrix in zip(stacked.split(widths, dim=1), matrices, strict=True):
        part.copy_(matrix)
    return stacked


def new_matrix(like, num_rows, num_columns):
    is_by_columns = like.device.type == "cpu" and like.dtype == torch.float32 and not native.suits(like)
    return like.new_empty(num_columns, num_rows).T if is_by_columns else like.new_empty(num_rows, num_columns)


def make_weight(value, tangent):
    weight = value.detach().as_subclass(Weight)
    weight.tangent = tangent
    return weight


def twice(value):
    """An input of the model for the rows of values and again for those of derivatives."""
    if isinstance(value, dict):
        return {key: twice(entry) for key, entry in value.items()}
    if isinstance(value, torch.Tensor) and value.dim() > 1:
        return torch.cat([value, value])
    return value


def halves(x):
    """(values, derivatives), views."""
    num_rows = len(x) // 2
    return x.narrow(0, 0, num_rows), x.narrow(0, num_rows, num_rows)


def pair_of(weight):
    """(value, tangent) of a Weight."""
    return weight.as_subclass(torch.Tensor), dense(weight.tangent)


def rows(x, first, last):
    """Rows first..last-1 of a Dual."""
    return torch.cat([half[first:last] for half in halves(x.as_subclass(torch.Tensor))]).as_subclass(Dual)


def stack(duals):
    """One Dual of the rows of several."""
    pairs = [halves(x.as_subclass(torch.Tensor)) for x in duals]
    return torch.cat([half for part in zip(*pairs, strict=True) for half in part]).as_subclass(Dual)


def as_dual(result):
    if isinstance(result, torch.Tensor):
        return result.as_subclass(Dual)
    return type(result)(map(as_dual, result))


# Operations: each rule gives NotImplemented where it does not hold, and `differentiate` takes over.


def apply(function, arguments, keywords):
    """A torch function of arguments among which are Duals or Weights (treated as plain tensors in here)."""
    rule = RULES.get(function)
    if rule is not None:
        result = rule(function, *arguments, **keywords)
        if result is not NotImplemented:
            return result
    if function.__name__ == "__get__":  # shape, dtype, device, ...
        result = function(*arguments)
        if not isinstance(result, torch.Tensor):
            return result
    return differentiate(function, arguments, keywords)


def differentiate(function, arguments, keywords):
    """Any operation, by torch's forward-mode AD."""
    duals = [x for x in leaves((arguments, keywords)) if isinstance(x, Dual)]
    split = functools.partial(to_forward, like=duals[0] if duals else None)
    with dual_level():
        inputs, others = mapped(split, arguments), {key: mapped(split, x) for key, x in keywords.items()}
        join = functools.partial(from_forward, inputs=inputs, is_weight=not duals)
        try:
            result = function(*inputs, **others)
        except NotImplementedError as error:  # some operations have no derivative
            raise not_covered(f"calls {function.__name__}") from error
        return mapped(join, result)


def not_covered(what):
    return NotImplementedError(f"the proxy's forward {what}")


def is_out_of_memory(error):
    """CPU allocators raise a plain RuntimeError; on a part of a GPU (MIG) CUDA's fails to tell why."""
    told = "can't allocate memory", "NVML_SUCCESS == r INTERNAL ASSERT FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in told)


def leaves(x):
    if isinstance(x, dict):
        return leaves(list(x.values()))
    return [leaf for entry in x for leaf in leaves(entry)] if isinstance(x, tuple | list) else [x]


def mapped(function, x):
    return type(x)([mapped(function, entry) for entry in x]) if isinstance(x, tuple | list) else function(x)


def to_forward(x, like):
    """What stands for x in forward-mode AD; of a constant with rows, those of values."""
    if isinstance(x, Dual):
        return make_dual(*halves(x))
    if isinstance(x, Weight):
        return make_dual(*pair_of(x))
    if isinstance(x, torch.Tensor) and like is not None and x.dim() == like.dim() and len(x) == len(like):
        return halves(x)[0]
    return x


def from_forward(x, inputs, is_weight):
    if not isinstance(x, torch.Tensor):
        return x
    if any(x is given for given in inputs):
        raise not_covered("changes an activation in place")
    value, tangent = unpack_dual(x)
    if not x.is_floating_point():
        return value if is_weight else torch.cat([value, value])
    tangent = torch.zeros_like(value) if tangent is None else tangent
    if is_weight:
        return make_weight(value, tangent)
    return torch.cat([value, tangent]).as_subclass(Dual)


def ask(function, x, *arguments, **keywords):
    """Sizes and the like."""
    return function(x, *arguments, **keywords)


def run_on_rows(function, x, *arguments, **keywords):
    """What treats rows alike and is linear."""
    if not isinstance(x, Dual):
        return NotImplemented
    return as_dual(function(x, *arguments, **keywords))


def convert(function, x, *arguments, **keywords):
    """Dtype, device and copies."""
    if isinstance(x, Dual):
        return as_dual(function(x, *arguments, **keywords))
    result = function(x, *arguments, **keywords)
    return x if result is x else NotImplemented


def reshape(function, x, *arguments, **keywords):
    """view, reshape, flatten, expand: the halves stay halves where the first dimension stays even."""
    result = function(x, *arguments, **keywords)
    if not isinstance(x, Dual) or len(result) % 2 or (len(x) != len(result) and result.numel() != x.numel()):
        return NotImplemented
    return as_dual(result)


def move_dimensions(function, x, *dims, **keywords):
    """transpose, permute and the like."""
    result = function(x, *dims, **keywords)
    if not isinstance(x, Dual) or len(result) != len(x) or result.stride(0) != x.stride(0):
        return NotImplemented
    return as_dual(result)


def along(position, default=0):
    """The rule of a function that works along dimension `dim`, its argument number `position`: not rows."""
    return functools.partial(run_along, position=position, default=default)


def run_along(function, x, *arguments, position, default, **keywords):
    dim = keywords.get("dim", arguments[position - 1] if len(arguments) >= position else default)
    tensors = x if isinstance(x, tuple | list) else [x]
    dims = dim if isinstance(dim, tuple | list) else [dim]
    if not all(isinstance(t, Dual) for t in tensors) or any(d % tensors[0].dim() == 0 for d in dims):
        return NotImplemented
    result = function(x, *arguments, **keywords)
    first = result if isinstance(result, torch.Tensor) else result[0]
    return as_dual(result) if len(first) == len(tensors[0]) else NotImplemented


def get_item(function, x, index):
    """x[:, ...] and x[..., i]: rows are left alone."""
    if not isinstance(x, Dual):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    num_tensors = sum(isinstance(part, torch.Tensor) for part in parts)
    first = parts[0]
    are_rows_kept = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
    if num_tensors > 1 or not are_rows_kept:
        raise not_covered("picks rows")
    return as_dual(function(x, index))


def add(function, x, y, **keywords):
    """x + y, x - y, and the same in place."""
    if type(x) is Dual and type(y) is Dual and x.dim() == y.dim():
        return function(x, y, **keywords).as_subclass(Dual)
    if isinstance(x, Weight) and isinstance(y, int | float) and not keywords:
        return make_weight(function(x.as_subclass(torch.Tensor), y), x.tangent)
    if not isinstance(x, Dual) or isinstance(y, Dual | Weight) or getattr(y, "ndim", 0) > x.dim():
        return NotImplemented
    result = x if function.__name__ in IN_PLACE else x.clone()
    is_of_rows = isinstance(y, torch.Tensor) and y.dim() == x.dim() and len(y) == len(x)
    value = result.narrow(0, 0, len(x) // 2)
    value.copy_(function(value, halves(y)[0] if is_of_rows else y, **keywords))
    return as_dual(result)


def multiply(function, x, y):
    if not isinstance(x, Dual):
        x, y = y, x
    if isinstance(x, Dual) and isinstance(y, Weight) and y.dim() == 1:
        product = x * y
        halves(product)[1].addcmul_(halves(x)[0], dense(y.tangent))
    elif isinstance(x, Dual) and isinstance(y, Dual) and x.dim() == y.dim():
        (value, tangent), both = halves(x), y.unflatten(0, (2, -1))
        product = (value * both).flatten(0, 1)
        halves(product)[1].addcmul_(tangent, both[0])
    elif not isinstance(x, Dual) or isinstance(y, Dual | Weight) or getattr(y, "ndim", 0) > x.dim():
        return NotImplemented
    else:
        product = x * y
    return as_dual(product)


def rescale(function, x, y, **keywords):
    """x / c and, in place, x c."""
    if keywords or not isinstance(x, Dual) or isinstance(y, Dual | Weight) or getattr(y, "ndim", 0) > x.dim():
        return NotImplemented
    return as_dual(function(x, y))


def power(function, x, exponent=2):
    if not isinstance(x, Dual) or not isinstance(exponent, int | float) or exponent != 2:
        return NotImplemented
    both = x.unflatten(0, (2, -1))
    square = (both[0] * both).flatten(0, 1)
    halves(square)[1].mul_(2)
    return as_dual(square)


def inverse_root(function, x):
    if not isinstance(x, Dual):
        return NotImplemented
    result = torch.empty_like(x)
    (value, tangent), (root, derivative) = halves(x), halves(result)
    torch.rsqrt(value, out=root)
    torch.mul(root**3, tangent, out=derivative).mul_(-0.5)
    return as_dual(result)


def run_elementwise(function, x, **keywords):
    """Functions of one number, by what backward mode has for them: it multiplies by the slope."""
    if type(x) is not Dual or keywords.pop("inplace", False):
        return NotImplemented
    (value, tangent), result = halves(x), torch.empty_like(x)
    (out, d_out), (compute, multiply_by_slope) = halves(result), ELEMENTWISE[function]
    compute(value, out=out, **keywords)
    multiply_by_slope(tangent, value, grad_input=d_out, **keywords)
    return as_dual(result)


def linear(function, x, weight, bias=None):
    if type(x) is not Dual or type(weight) is not Weight:
        return NotImplemented
    rows, num_outputs, g_OI = x.reshape(-1, x.shape[-1]), weight.shape[0], weight.tangent
    num_rows = rows.shape[0] // 2
    if weight.extended is not None:  # one product gives W x, W dx and right x
        products = functional.linear(rows, weight.extended)
        y, thin = products.split((num_outputs, g_OI.left.shape[1]), dim=1)
        y.narrow(0, num_rows, num_rows).addmm_(thin.narrow(0, 0, num_rows), g_OI.left.T)
    else:
        y = functional.linear(rows, weight)
        add_product_(y[num_rows:], rows[:num_rows], g_OI)
    if bias is not None:
        for half, part in zip(halves(y), pair_of(bias), strict=True):
            half += part
    return y.view(*x.shape[:-1], num_outputs).as_subclass(Dual)


def add_product_(target_NO, x_NI, g_OI):
    """target += x g^T, for g as it is or in factors."""
    if isinstance(g_OI, Factors):
        return target_NO.addmm_(x_NI @ g_OI.right.T, g_OI.left.T)
    return target_NO.addmm_(x_NI, g_OI.T)


def add_linear(function, bias, x, weight, **keywords):
    """addmm, by which GPT-2 writes its linear layers, weight (I, O)."""
    if keywords or not isinstance(x, Dual) or not isinstance(weight, Weight):
        return NotImplemented
    return linear(function, x, make_weight(weight.T, weight.tangent.T), bias)


def embed(function, ids, weight, padding_idx=None, max_norm=None, *others, **keywords):
    if not isinstance(weight, Weight) or max_norm is not None:
        return NotImplemented
    return as_dual(torch.cat(look_up(halves(ids)[0], weight)))


def look_up(ids, weight):
    """Rows of a Weight and their derivatives."""
    g = weight.tangent
    tangents = functional.embedding(ids, g.left if isinstance(g, Factors) else g)
    if isinstance(g, Factors):
        tangents = tangents @ g.right
    return functional.embedding(ids, weight.as_subclass(torch.Tensor)), tangents


def named(names, rule):
    """{function: rule} of what goes by these names in torch, torch.Tensor and torch.nn.functional."""
    places = (torch, torch.Tensor, functional)
    return {getattr(place, name): rule for name in names.split() for place in places if hasattr(place, name)}


ELEMENTWISE = {
    functional.silu: (torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input),
    functional.gelu: (torch.ops.aten.gelu.out, torch.ops.aten.gelu_backward.grad_input),
}
RULES = {
    **named("size dim ndimension numel stride is_floating_point is_complex is_contiguous __len__", ask),
    **named("neg __neg__ dropout", run_on_rows),
    **named("to float half bfloat16 type_as contiguous clone detach", convert),
    **named("view reshape flatten unflatten expand", reshape),
    **named("transpose swapaxes permute", move_dimensions),
    **named("chunk split", along(2)),
    **named("cat concat sum mean unbind unsqueeze", along(1)),
    **named("__getitem__", get_item),
    **named("add __add__ __radd__ __iadd__ add_ sub __sub__ __isub__ sub_", add),
    **named("mul __mul__ __rmul__", multiply),
    **named("div __truediv__ true_divide div_ __itruediv__ mul_ __imul__", rescale),
    **named("pow __pow__ square", power),
    **named("rsqrt", inverse_root),
    **dict.fromkeys(ELEMENTWISE, run_elementwise),
    **named("linear", linear),
    **named("addmm", add_linear),
    **named("embedding", embed),
}


# RMS norms, which come twice or more a layer: eight operations of the library, each with its derivative


def find_norms(model):
    """[(module, offset, eps)] of what computes x / sqrt(mean x^2 + eps) * (offset + weight).

    Found by what they compute: a module that is anything else keeps its own forward.
    """
    found = []
    for module in model.modules():
        parameters = dict(module.named_parameters())
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if list(parameters) == ["weight"] and module.weight.dim() == 1 and isinstance(eps, float):
            found += [(module, offset, eps) for offset in (0, 1) if is_norm(module, offset, eps)]
    return found


@torch.no_grad()
def is_norm(module, offset, eps):
    x = torch.linspace(-1, 3, 2 * len(module.weight), device=module.weight.device).view(2, -1)
    x[1] *= 3 * eps**0.5  # where eps matters
    no_tangent = make_weight(module.weight, torch.zeros_like(module.weight))
    wanted = normalise(scale(no_tangent, offset), eps, torch.cat([x, torch.zeros_like(x)]))[:2]
    found = module(x.to(module.weight.dtype)).float()
    tolerance = 4 * torch.finfo(module.weight.dtype).eps
    return found.shape == x.shape and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


def scale(weight, offset):
    """(2, D), float32: what the normalised values are multiplied by, above its derivative."""
    value, tangent = pair_of(weight)
    return torch.stack([offset + value.float(), tangent.float()])


def apply_norm(scale_2D, eps, x):
    with torch._C.DisableTorchFunctionSubclass():
        return normalise(scale_2D, eps, x).to(x.dtype).as_subclass(Dual)


def normalise(scale_2D, eps, x):
    """float32 (2B, ..., D) of values over derivatives."""
    both, width = x.reshape(2, len(x) // 2, *x.shape[1:]).float(), x.shape[-1]
    squares, products = (both[0] * both).sum(-1, keepdim=True).unbind()  # of x^2 and of x dx
    root = squares.mul(1 / width).add_(eps).rsqrt_()
    result = both * root
    value, tangent = result.unbind()
    tangent.addcmul_(value, products * root * root, value=-1 / width)
    scaled = result * scale_2D[0]
    scaled[1].addcmul_(value, scale_2D[1])
    return scaled.flatten(0, 1)


def unit_rows(rows_3NJ, ones_R1):
    """x / |x| above its derivative dx / |x| - x (x dx) / |x|^3, (2N, J), of [0; x; dx].

    The derivative is its own transpose, so what backward mode has for rows scaled to length 1 (weight
    normalisation) does it in one pass. With x for dx, 0 for x and the same |x| it gives x / |x|.
    """
    dtype = rows_3NJ.dtype
    kept = dtype if dtype == torch.float64 else torch.float32
    twice_2NJ = rows_3NJ[1:2].expand(2, -1, -1)
    lengths = torch.linalg.vector_norm(twice_2NJ, dim=-1, dtype=kept).view(-1, 1)
    given, rows = rows_3NJ[1:].flatten(0, 1), rows_3NJ[:2].flatten(0, 1)
    return torch.ops.aten._weight_norm_interface_backward(given, rows, ones_R1, lengths, 0)[0]


def softmax(scores):
    """Probabilities P above their derivatives (P, 2S, L), of scores above theirs: dP = P (dS - sum(P dS)).

    The derivative is its own transpose, so what backward mode has does it. It is told to take P from S rows
    further up, and so runs on all rows as they lie: what it makes of the values means nothing and goes.
    """
    size, shape = scores.shape[1] // 2, scores.shape
    room = scores.new_empty(size + shape[0] * shape[1], shape[2])
    probs = torch.softmax(scores, -1, out=room[size:].view(shape))
    shifted = room[:-size].view(shape)
    both = torch.ops.aten._softmax_backward_data(scores, shifted, -1, scores.dtype)
    both[:, :size] = probs[:, :size]
    return both


class DualCache(SlotCache):
    """A SlotCache that has the derivatives of a slot's keys and values num_slots slots further on.

    gives_pairs: attention gets (values, derivatives), (B K, L, D), rather than a Dual.
    """

    num_parts = 2

    def __init__(self, make_storage, num_slots, num_positions, gives_pairs=True):
        super().__init__(make_storage, num_slots, num_positions)
        self.gives_pairs = gives_pairs

    def double_placement(self, num_rows):
        """Place what a batch of num_rows rows of values, and of derivatives, will give to `update`."""
        place = self.placement
        self.placement = Placement(
            torch.cat([place.rows, place.rows + num_rows]),
            torch.cat([place.columns, place.columns]),
            torch.cat([place.slots, place.slots + self.storage.num_slots]),
            torch.cat([place.positions, place.positions]),
            place.read,
        )

    def update(self, keys_BKTD, values_BKTD, layer_idx, *args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            self.storage.write(layer_idx, keys_BKTD, values_BKTD, self.placement)
            if self.placement.read is None:
                return keys_BKTD, values_BKTD
            first, num_rows, length = self.placement.read
            starts = first, first + self.storage.num_slots
            halves = [self.storage.read(layer_idx, start, num_rows, length) for start in starts]
            return tuple(map(self.join, *halves))

    def join(self, values_BKLD, derivatives_BKLD):
        if self.gives_pairs:
            return values_BKLD.flatten(0, 1), derivatives_BKLD.flatten(0, 1)
        return torch.cat([values_BKLD, derivatives_BKLD]).as_subclass(Dual)


def log_probs_change(probs_BV, tangents_BV):
    """The derivative of log-probabilities (B, V), of probabilities and the derivatives of their logits.

    d log p(x) = dz(x) - sum over y of p(y) dz(y), for logits z.
    """
    change_BV = tangents_BV - torch.linalg.vecdot(probs_BV, tangents_BV)[:, None]
    # what all logits share is large and rounds; now the rest of it goes
    return change_BV.sub_(torch.linalg.vecdot(probs_BV, change_BV)[:, None])


def dual_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **others
):
    """softmax(softcap(scaling q k^T) + mask) v of a Dual of queries, (B, H, T, D) by its values.

    Keys and values are Duals, (B, K, L, D) by their values, or pairs of (B K, L, D). Returns a Dual,
    (B, T, H, D) by its values, and None. The mask (2B, 1, T, L) is added to the scores; softmax is float32.
    """
    check_covered(attention_mask, others)
    with torch._C.DisableTorchFunctionSubclass():
        pairs = [
            x if isinstance(x, tuple) else tuple(h.flatten(0, 1) for h in halves(x)) for x in (key, value)
        ]
        output = attend(query, *pairs[0], *pairs[1], attention_mask, scaling, softcap)
        return output.as_subclass(Dual), None


def attend(query, k, dk, v, dv, mask, scaling, softcap):
    num_rows, num_heads, num_tokens, width = len(query) // 2, *query.shape[1:]
    num_keys, num_groups = len(k) // num_rows, num_heads * num_rows // len(k)
    size, shape = num_groups * num_tokens, (num_rows, num_keys, 2, num_groups, num_tokens)
    # the heads that share keys are rows of one product, above those of their derivatives
    queries = query.new_empty(*shape, width)
    grouped = query.unflatten(1, (num_keys, num_groups)).unflatten(0, (2, -1)).permute(1, 2, 0, 3, 4, 5)
    queries = torch.mul(grouped, scaling or width**-0.5, out=queries).view(len(k), 2 * size, width)
    scores, d_scores = torch.bmm(queries, k.mT).float().split(size, dim=1)
    d_scores = torch.bmm(queries[:, :size], dk.mT).float().add_(d_scores)  # baddbmm_ into a slice is slow
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, d_scores = softcap * capped, d_scores * (1 - capped**2)
    masked = scores.reshape(num_rows, num_keys, num_groups, num_tokens, -1) + mask[:num_rows, :, None]
    parts = weigh(masked.view(d_scores.shape), d_scores, v, dv)
    output = torch.stack(parts).view(2, num_rows, num_keys, num_groups, num_tokens, width)
    return output.permute(0, 1, 4, 2, 3, 5).reshape(2 * num_rows, num_tokens, num_heads, width)


def weigh(scores, d_scores, v, dv):
    """softmax(scores) v and its derivative, (P, S, D) each, of float32 scores (P, S, L) and v (P, L, D).

    d(P v) = P dv + (P dS) v - sum(P dS) P v, for probabilities P of scores S.
    """
    size = scores.shape[1]
    both = scores.new_empty(len(scores), 2 * size, scores.shape[2])
    probs, changes = both.split(size, dim=1)
    torch.softmax(scores, -1, out=probs)
    torch.mul(probs, d_scores, out=changes)
    sums, both = changes.sum(-1, keepdim=True), both.to(v.dtype)
    value, change = torch.bmm(both, v).split(size, dim=1)
    change = torch.bmm(both[:, :size], dv).add_(change)
    return value, change.addcmul_(value, sums, value=-1)


def check_covered(attention_mask, others):
    unknown = [name for name in NOT_COVERED if others.get(name) is not None]
    if unknown:
        raise not_covered(f"attends with {', '.join(unknown)}, which attn_implementation=eager may cover")
    assert attention_mask is not None, "a mask is always made: see eager_mask"


AttentionInterface.register(ATTENTION, dual_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
