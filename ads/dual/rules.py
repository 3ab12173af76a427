"""How each operation acts on dual numbers: rules for those that need one, forward-mode AD for all others.

A rule is called with the function and its arguments, and returns NotImplemented where it does not hold.

Shapes: N rows of values, I inputs and O outputs of a linear layer.
"""

import functools

import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.nn import functional
from torch.utils._pytree import tree_leaves, tree_map

from ads.dual.factors import Factors, dense

IN_PLACE = ("__iadd__", "add_", "__isub__", "sub_")


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


def make_weight(value, tangent):
    weight = value.detach().as_subclass(Weight)
    weight.tangent = tangent
    return weight


def halves(x):
    """(values, derivatives), views."""
    num_rows = len(x) // 2
    return x.narrow(0, 0, num_rows), x.narrow(0, num_rows, num_rows)


def pair_of(weight):
    """(value, tangent) of a Weight."""
    return weight.as_subclass(torch.Tensor), dense(weight.tangent)


def as_dual(result):
    if isinstance(result, torch.Tensor):
        return result.as_subclass(Dual)
    return type(result)(map(as_dual, result))


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
    duals = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, Dual)]
    split = functools.partial(to_forward, like=duals[0] if duals else None)
    with dual_level():
        inputs, others = tree_map(split, (arguments, keywords))
        join = functools.partial(from_forward, inputs=inputs, is_weight=not duals)
        try:
            result = function(*inputs, **others)
        except NotImplementedError as error:  # some operations have no derivative
            raise not_covered(f"calls {function.__name__}") from error
        return tree_map(join, result)


def not_covered(what):
    return NotImplementedError(f"the proxy's forward {what}")


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


def convert(function, x, *arguments, **keywords):
    """What treats all rows alike: dtype, device, copies, signs."""
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


def along(function, x, *arguments, position=1, **keywords):
    """A function that works along dimension `dim`, its argument number `position`: any but that of rows."""
    dim = keywords.get("dim", arguments[position - 1] if len(arguments) >= position else 0)
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
    if not isinstance(x, Dual) or isinstance(y, Dual | Weight) or getattr(y, "ndim", 0) > x.dim():
        return NotImplemented
    result = x if function.__name__ in IN_PLACE else x.clone()
    is_of_rows = isinstance(y, torch.Tensor) and y.dim() == x.dim() and len(y) == len(x)
    value = result.narrow(0, 0, len(x) // 2)
    value.copy_(function(value, halves(y)[0] if is_of_rows else y, **keywords))
    return as_dual(result)


def multiply(function, x, y):
    """x y for a Dual and whatever else, in either order."""
    if not isinstance(x, Dual):
        x, y = y, x
    if isinstance(x, Dual) and isinstance(y, Weight) and y.dim() == 1:
        product = x * y
        halves(product)[1].addcmul_(halves(x)[0], dense(y.tangent))
    elif isinstance(x, Dual) and isinstance(y, Dual) and x.dim() == y.dim():
        (value, tangent), both = halves(x), y.unflatten(0, (2, -1))
        product = (value * both).flatten(0, 1)
        halves(product)[1].addcmul_(tangent, both[0])
    else:
        return rescale(torch.mul, x, y)
    return as_dual(product)


def rescale(function, x, y, **keywords):
    """x c and x / c for a constant c, also in place."""
    if keywords or not isinstance(x, Dual) or isinstance(y, Dual | Weight) or getattr(y, "ndim", 0) > x.dim():
        return NotImplemented
    return as_dual(function(x, y))


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
    """W x + b for a Dual and Weights: dy = W dx + dW x + db."""
    if type(x) is not Dual or type(weight) is not Weight:
        return NotImplemented
    rows, num_outputs, g_OI = x.reshape(-1, x.shape[-1]), weight.shape[0], weight.tangent
    num_rows = rows.shape[0] // 2
    if weight.extended is not None:  # one product gives W x, W dx and right x
        products = functional.linear(rows, weight.extended)
        y, thin = products.split((num_outputs, g_OI.left.shape[1]), dim=1)
        y[num_rows:].addmm_(thin[:num_rows], g_OI.left.T)
    else:
        y, x_NI = functional.linear(rows, weight), rows[:num_rows]
        factors = (x_NI @ g_OI.right.T, g_OI.left.T) if isinstance(g_OI, Factors) else (x_NI, g_OI.T)
        y[num_rows:].addmm_(*factors)
    if bias is not None:
        for half, part in zip(halves(y), pair_of(bias), strict=True):
            half += part
    return y.view(*x.shape[:-1], num_outputs).as_subclass(Dual)


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
    **named("to float half bfloat16 type_as contiguous clone detach neg __neg__ dropout", convert),
    **named("view reshape flatten unflatten expand", reshape),
    **named("transpose swapaxes permute", move_dimensions),
    **named("chunk split", functools.partial(along, position=2)),
    **named("cat concat sum mean unbind unsqueeze", along),
    **named("__getitem__", get_item),
    **named("add __add__ __radd__ __iadd__ add_ sub __sub__ __isub__ sub_", add),
    **named("mul __mul__ __rmul__", multiply),
    **named("div __truediv__ true_divide div_ __itruediv__ mul_ __imul__", rescale),
    **dict.fromkeys(ELEMENTWISE, run_elementwise),
    **named("linear", linear),
    **named("addmm", add_linear),
    **named("embedding", embed),
}


def softmax(scores):
    """Probabilities P above their derivatives (P, 2S, L), of scores above theirs: dP = P (dS - sum(P dS)).

    Backpropagation through a softmax is the same formula, so torch's kernel for it serves. One call does all
    rows: it needs probabilities for each, and finds P for the derivatives in the rows of the values, S rows
    up. What it makes of the scores themselves is then overwritten by P.
    """
    size, shape = scores.shape[1] // 2, scores.shape
    room = scores.new_empty(size + shape[0] * shape[1], shape[2])
    probs = torch.softmax(scores, -1, out=room[size:].view(shape))
    shifted = room[:-size].view(shape)
    both = torch.ops.aten._softmax_backward_data(scores, shifted, -1, scores.dtype)
    both[:, :size] = probs[:, :size]
    return both
