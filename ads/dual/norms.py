"""RMS norms in dual numbers."""

import torch

from ads.dual.rules import Dual, make_weight, pair_of


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
