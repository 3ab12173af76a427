"""Delta exactly: how fast log p(x) of the proxy changes as its weights theta move along the gradient g.

    Delta(x) = <g, d log p(x; theta) / d theta> = dz(x) - sum over y of p(y) dz(y)

This is the limit of the central difference (paper eq. 10) as eps goes to 0, without an eps to choose. z are
the proxy's logits and dz their derivatives along g: one pass in dual numbers gives both (dual/model.py).

Shapes: B rows, V vocabulary (the teacher's token ids), R >= V logits of the proxy.
"""

import torch

from ads.decode.cached_model import CachedModel
from ads.delta.central import check_length
from ads.delta.check import make_checked
from ads.delta.proxy import Proxy
from ads.dual.factors import square_norm
from ads.dual.rules import halves


def log_probs_change(probs_BV, tangents_BV):
    """The derivative of log p (B, V), of probabilities p and the derivatives dz of their logits."""
    change_BV = tangents_BV - torch.linalg.vecdot(probs_BV, tangents_BV)[:, None]
    # what all dz share is large, and rounding leaves some of it: once more takes that away
    return change_BV.sub_(torch.linalg.vecdot(probs_BV, change_BV)[:, None])


class ExactDerivative(Proxy):
    """One proxy in dual numbers, whose score is Delta."""

    def __init__(self, model, read_gradient, shared_V):
        """model is taken over; read_gradient(name) is g of a parameter, a tensor or Factors; shared_V: bool
        mask of the ids that mean the same to the teacher.

        Raises ValueError when the gradient is zero or not finite, or the derivative is not covered.
        """
        CachedModel(model, may_fuse=False)  # a model that cannot be decoded at all is refused as such
        dual_model = make_checked(model, load_gradient(model, read_gradient).__getitem__)
        self.dual = CachedModel(dual_model)
        super().__init__(self.dual)
        self.shared_V, self.are_all_shared = shared_V, bool(shared_V.all())

    def score(self, logits_BR):
        """Delta (nats per unit of g) over the shared ids; 0 elsewhere."""
        both = logits_BR.as_subclass(torch.Tensor)[:, : len(self.shared_V)].float()
        logits_BV, tangents_BV = halves(both)
        if self.are_all_shared:
            return log_probs_change(torch.softmax(logits_BV, -1), tangents_BV)
        probs_BV = torch.softmax(logits_BV.masked_fill(~self.shared_V, -torch.inf), -1)
        return log_probs_change(probs_BV, tangents_BV).masked_fill_(~self.shared_V, 0.0)


def load_gradient(model, read_gradient):
    """{parameter name: its part of g, in its dtype and on its device}; each part is read once."""
    g, square = {}, 0.0
    for name, p in model.named_parameters():
        part = read_gradient(name)
        square += square_norm(part)
        g[name] = part.to(p)
    check_length(square)
    return g
