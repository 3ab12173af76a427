"""How well the Delta that traces will be sampled with agrees with the exact one (float32, full gradient).

On some positions of a few holdout traces, over the tokens x with p(x) > 1e-4, Delta centred per position:
correlation and |sin| of the angle to the exact Delta (paper App. B), relative error. The cost is about 15
forward passes of those traces, and the proxy once more in memory.

Shapes: P positions (of all traces together), V vocabulary.
"""

import copy
import functools

import torch

from ads.decode.memory_plan import NUM_POSITIONS
from ads.delta.check import make_checked
from ads.delta.exact import log_probs_change
from ads.dual.factors import dense
from ads.dual.rules import halves
from ads.loading import dtype_name, load_model
from ads.stage.errors import UserError

LEAST_PROBABILITY = 1e-4
EPS_LADDER = (1e-4, 1e-3, 1e-2, 3e-2)
SPREADS = (0.1, 0.3, 0.5)  # of lam * Delta, in nats


def diagnose(cfg, model, compressed, half, sequences):
    """The sidecar's entry: a dict of figures, rounded.

    model: float32, its parameters' .grad being g; compressed: what the gradient file holds; half: that of
    half the sequences, or None. sequences: the loss.Sequence list to look at; cfg: the GradConfig.
    Raises ValueError where there is nothing to compare.
    """
    device = model.get_input_embeddings().weight.device
    dtype = dtype_name(cfg.proxy_dtype, device)
    full = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    truth_PV, log_probs_PV = exact(twin(model), full.__getitem__, sequences)
    if not likely(log_probs_PV)[1].any():
        raise UserError(f"nowhere in {len(truth_PV)} positions have three tokens p > {LEAST_PROBABILITY:g}")
    compare = functools.partial(agreement, truth_PV=truth_PV, log_probs_PV=log_probs_PV)
    found = {"num_positions": len(truth_PV), "dtype": dtype, "rank": cfg.grad_rank}
    given = cfg.proxy_student, cfg.proxy_dtype, device, cfg.attn_implementation
    rounded = twin(model) if dtype == "float32" else load_model(*given)
    found["exact"] = compare(exact(rounded, compressed.__getitem__, sequences)[0])
    del rounded
    moved = load_model(*given)
    found["central"] = {
        f"{eps:g}": compare(central(model, moved, compressed, eps, sequences))
        for eps in sorted({*EPS_LADDER, *([cfg.eps] if cfg.eps else [])})
    }
    found["best_eps"] = max(found["central"], key=lambda eps: found["central"][eps]["correlation"])
    if half is not None:
        # Delta is linear in g: that of the other half is the rest
        half_PV = exact(twin(model), half.__getitem__, sequences)[0]
        found["split_half"] = agreement(half_PV, truth_PV - half_PV, log_probs_PV)
    return found | spread(truth_PV, log_probs_PV)


def twin(model):
    """A model of its own modules with the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def exact(model, read_gradient, sequences):
    """(Delta, log p), both float32 (P, V), by forward-mode differentiation; the model is taken over."""
    dual_model = make_checked(model, read_gradient)
    pairs = [halves(logits_at(dual_model, s).as_subclass(torch.Tensor)) for s in sequences]
    logits_PV, tangents_PV = (torch.cat(parts).float() for parts in zip(*pairs, strict=True))
    log_probs_PV = torch.log_softmax(logits_PV, -1)
    return log_probs_change(log_probs_PV.exp(), tangents_PV), log_probs_PV


@torch.no_grad()
def central(model, moved, compressed, eps, sequences):
    """Delta (P, V) by the central difference of `moved`, whose weights are overwritten."""
    log_probs = []
    for step in (eps, -eps):
        for (name, p), target in zip(model.named_parameters(), moved.parameters(), strict=True):
            g = dense(compressed[name])
            target.copy_(p.to(target.dtype).float() + step * g)
        logits = torch.cat([logits_at(moved, s) for s in sequences])
        log_probs.append(torch.log_softmax(logits.float(), -1))
    return (log_probs[0] - log_probs[1]) / (2 * eps)


def logits_at(model, sequence):
    """Logits (P, V) at the places of a sequence."""
    device = model.get_input_embeddings().weight.device
    ids_1T = torch.tensor([sequence.ids], device=device)
    logits = model(input_ids=ids_1T, use_cache=False, logits_to_keep=places(sequence, device)).logits
    return logits.flatten(0, 1)


def places(sequence, device):
    """Evenly spaced positions (P,) that foretell response tokens, the first and the last among them."""
    num_tokens = len(sequence.ids) - sequence.num_prompt_tokens
    spaced_P = torch.linspace(0, num_tokens - 1, min(num_tokens, NUM_POSITIONS), device=device)
    return spaced_P.round().long() + sequence.num_prompt_tokens - 1


def agreement(delta_PV, truth_PV, log_probs_PV):
    """{correlation, correlation_p10, sine, relative_error} of Delta, where three tokens are likely."""
    seen_PV, kept_P = likely(log_probs_PV)
    delta_PV, truth_PV = (centre(d, seen_PV) for d in (delta_PV, truth_PV))
    product_P = (delta_PV * truth_PV).sum(-1)
    correlation_P = (product_P / (delta_PV.norm(dim=-1) * truth_PV.norm(dim=-1)))[kept_P].nan_to_num(0.0)
    errors = ((delta_PV - truth_PV) / truth_PV).abs()[seen_PV & kept_P[:, None]]
    figures = {
        "correlation": correlation_P.mean(),
        "correlation_p10": correlation_P.quantile(0.1),
        "sine": (1 - correlation_P.square()).clamp(min=0).sqrt().mean(),
        "relative_error": errors.median(),
    }
    return {key: round(value.item(), 5) for key, value in figures.items()}


def likely(log_probs_PV):
    """Which tokens are compared (P, V), and the positions with at least three of them (P,)."""
    seen_PV = log_probs_PV.exp() > LEAST_PROBABILITY
    return seen_PV, seen_PV.sum(-1) >= 3


def centre(values_PV, seen_PV):
    """Minus the mean over the tokens seen; 0 at the others."""
    mean_P1 = (values_PV * seen_PV).sum(-1, keepdim=True) / seen_PV.sum(-1, keepdim=True)
    return (values_PV - mean_P1) * seen_PV


def spread(truth_PV, log_probs_PV):
    """The standard deviation of Delta (nats per unit of lam), and the lam that give lam Delta SPREADS."""
    seen_PV, _ = likely(log_probs_PV)
    deviation = centre(truth_PV, seen_PV).square().sum().div(seen_PV.sum()).sqrt().item()
    lams = {f"{s:g}": float(f"{s / deviation:.4g}") for s in SPREADS} if deviation else {}
    return {"delta_std": float(f"{deviation:.4g}"), "lam_of_spread": lams}
