"""Delta by the central difference: two proxies, their weights theta moved along the gradient g and back.

    Delta(x) = [log p(x; theta + eps g) - log p(x; theta - eps g)] / (2 eps)          paper eq. 10

It says how much one training step of the proxy on each token would raise its loss on clean holdout traces. g
is whole or in factors (dual/factors.py). exact.py has the limit of eps to 0.

Shapes: B rows, V vocabulary (the teacher's token ids), R >= V logits of a proxy.
"""

from dataclasses import asdict, dataclass

import torch

from ads import sampling
from ads.decode.cached_model import CachedModel
from ads.delta.proxy import Proxy
from ads.dual.factors import dense
from ads.stage.errors import UserError
from ads.stage.settings import LEAST_COSINE


class CentralDifference(Proxy):
    """Two perturbed proxies, whose score is Delta."""

    def __init__(self, plus, minus, eps: float, shared_V):
        """plus, minus: models that perturb_ made; shared_V: bool mask of the ids the teacher shares."""
        self.plus, self.minus = CachedModel(plus), CachedModel(minus)
        super().__init__(self.plus, self.minus)
        self.eps, self.shared_V = eps, shared_V

    def score(self, plus_BR, minus_BR):
        """Delta (nats per unit of g), of log-probabilities over the shared ids; 0 elsewhere."""
        log_plus_BV = sampling.log_probs(plus_BR, self.shared_V)
        log_minus_BV = sampling.log_probs(minus_BR, self.shared_V)
        delta_BV = (log_plus_BV - log_minus_BV) / (2 * self.eps)
        return torch.where(self.shared_V, delta_BV, 0.0)


@dataclass(frozen=True)
class Perturbation:
    """How well 16-bit (or 32-bit) weights hold theta +- eps g: the stored difference against 2 eps g."""

    share_changed: float  # share of the weights with a nonzero gradient that differ between the two models
    cosine: float  # between the stored and the wanted difference
    relative_norm: float  # stored over wanted norm


@torch.no_grad()
def perturb_(plus, minus, read_gradient, eps: float) -> Perturbation:
    """Turn two copies of the proxy into theta + eps g and theta - eps g; returns the realised Perturbation.

    read_gradient(name) gives the float32 gradient of a parameter, a tensor or Factors. The sum is made in
    float32 and rounded once to the models' dtype, so eps g is lost only as far as that dtype cannot hold
    it. Raises ValueError when the gradient is zero or not finite.
    """
    changed = wanted = dot = norm_stored = norm_wanted = 0.0
    minus_parameters = dict(minus.named_parameters())
    for name, plus_parameter in plus.named_parameters():
        minus_parameter = minus_parameters[name]
        g = dense(read_gradient(name).to(plus_parameter.device))
        above, below = plus_parameter.float() + eps * g, minus_parameter.float() - eps * g
        plus_parameter.copy_(above)
        minus_parameter.copy_(below)
        stored = plus_parameter.float() - minus_parameter.float()
        changed += ((stored != 0) & (g != 0)).sum().item()
        wanted += (g != 0).sum().item()
        dot += (stored * g).sum(dtype=torch.float64).item()
        norm_stored += stored.square().sum(dtype=torch.float64).item()
        norm_wanted += g.square().sum(dtype=torch.float64).item()
    check_length(norm_wanted)
    return Perturbation(
        share_changed=changed / wanted,
        cosine=dot / (norm_stored * norm_wanted) ** 0.5 if norm_stored else 0.0,
        relative_norm=(norm_stored / norm_wanted) ** 0.5 / (2 * eps),
    )


def check_length(square_norm):
    if not 0 < square_norm < float("inf"):
        raise UserError(
            f"the gradient is {'zero' if square_norm == 0 else 'not finite'}: make it with save_grad.py"
        )


def warning(perturbation: Perturbation, eps: float, dtype: str) -> str | None:
    """One line if the perturbation was largely lost to rounding, else None."""
    if perturbation.cosine >= LEAST_COSINE:
        return None
    return (
        f"WARNING: theta +- eps g is lost to rounding: cosine {perturbation.cosine:.3f} between stored "
        f"and wanted perturbation (eps={eps:g}, proxy_dtype={dtype}). Use proxy_dtype=float32 or a larger eps"
    )


def describe(perturbation: Perturbation) -> dict[str, float]:
    """The perturbation's figures for a sidecar."""
    return {key: round(value, 6) for key, value in asdict(perturbation).items()}
