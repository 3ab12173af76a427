"""Scores of the defences that read a plain proxy: s(x) from the log-probabilities of teacher and proxy.

    poe            s = log p_P(x): the trace holds little that the student does not know. In terms of logits z,
                   log p_T / tau + lam log p_P is ((1 - gamma) z_T + gamma z_P) / tau' for
                   tau' = (1 - gamma) tau and lam = gamma / tau' (distillation-game, arXiv 2605.22737)
    gated_poe      s = H(p_P) log p_P(x), H in nats: acts where the proxy is unsure. (What the entropy is
                   divided by, its mean, only rescales lam: here 1 nat.)
    contrastive    s = -log p_P(x) on tokens with p_T(x) >= plausibility max p_T, all others are ruled out
                   (DOGe's direction, arXiv 2505.19504, on contrastive decoding's plausible set, 2210.15097)

Ids that mean something else to the proxy have log p_P = -inf. They get the mean of s under p_T: a tilt by s
leaves them, in the mean, as likely as they were.

Shapes: B rows, V vocabulary. All float32.
"""

import math

import torch

RULED_OUT = -1e18  # finite, so that lam_t = 0 is the teacher's own distribution, and its square is
LEAST_MASS = 1e-30


def poe(log_p_BV, log_proxy_BV, sampling):
    return fill(log_p_BV, log_proxy_BV)


def gated_poe(log_p_BV, log_proxy_BV, sampling):
    return entropy(log_proxy_BV)[:, None] * fill(log_p_BV, log_proxy_BV)


def contrastive(log_p_BV, log_proxy_BV, sampling):
    least_B1 = log_p_BV.amax(-1, keepdim=True) + math.log(sampling.plausibility)
    return fill(log_p_BV, log_proxy_BV).neg().masked_fill_(log_p_BV < least_B1, RULED_OUT)


def entropy(log_proxy_BV):
    """H(p_P) (B,) in nats."""
    probs_BV = log_proxy_BV.exp()
    return -torch.xlogy(probs_BV, probs_BV).sum(-1)


def fill(log_p_BV, log_proxy_BV):
    """log p_P, with its mean under p_T where the proxy does not know an id."""
    known_BV = log_proxy_BV > -torch.inf
    if known_BV.all():
        return log_proxy_BV
    probs_BV, finite_BV = log_p_BV.exp() * known_BV, log_proxy_BV.masked_fill(~known_BV, 0.0)
    mean_B = torch.linalg.vecdot(probs_BV, finite_BV) / probs_BV.sum(-1).clamp(min=LEAST_MASS)
    return torch.where(known_BV, log_proxy_BV, mean_B[:, None])
