"""Scores of the defences that read a proxy: s(x) of teacher's and proxy's log-probabilities, or of Delta.

    delta          Delta as it is: antidistillation sampling
    permuted       Delta with its values in a random order and with random signs: the paper's baseline
    poe            s = log p_P(x): the trace holds little that the student does not know. In terms of logits,
                   ((1 - gamma) z_T + gamma z_P) / t is tau = t / (1 - gamma), lam = gamma / t
                   (distillation-game, arXiv 2605.22737)
    gated_poe      s = H(p_P) log p_P(x), H in nats: acts where the proxy is unsure. (What the entropy is
                   divided by, its mean, only rescales lam: here 1 nat.)
    contrastive    s = -log p_P(x) on tokens with p_T(x) >= plausibility max p_T, all others are ruled out
                   (DOGe's direction, arXiv 2505.19504, on contrastive decoding's plausible
                   set, arXiv 2210.15097)

Ids that mean something else to the proxy have log p_P = -inf. They get the mean of s under p_T: a tilt by s
leaves them, in the mean, as likely as they were.

Shapes: B rows, V vocabulary. All float32.
"""

import math

import torch

from ads.sampling import random_bits

RULED_OUT = -1e18  # finite, so that lam_t = 0 is the teacher's own distribution, and its square is
LEAST_MASS = 1e-30


def delta(step):
    return step.proxy_BV


def permuted(step):
    """Delta in a random order with random signs, by the row's key and step alone."""
    ids_V = torch.arange(step.proxy_BV.shape[-1], device=step.proxy_BV.device)
    bits_BV = random_bits(random_bits(step.keys_B, step.steps_B)[:, None], ids_V)
    signs_BV = 1 - 2 * (bits_BV & 1)  # the order hangs on the high bits
    return step.proxy_BV.gather(-1, bits_BV.argsort(-1)) * signs_BV


def poe(step):
    return fill(step)


def gated_poe(step):
    return entropy(step.proxy_BV)[:, None] * fill(step)


def contrastive(step):
    least_B1 = step.log_p_BV.amax(-1, keepdim=True) + math.log(step.settings.plausibility)
    return fill(step).neg().masked_fill_(step.log_p_BV < least_B1, RULED_OUT)


def entropy(log_proxy_BV):
    """H(p_P) (B,) in nats."""
    probs_BV = log_proxy_BV.exp()
    return -torch.xlogy(probs_BV, probs_BV).sum(-1)


def fill(step):
    """log p_P, with its mean under p_T where the proxy does not share an id."""
    shared_V = step.settings.shared_V
    if shared_V is None:
        return step.proxy_BV
    probs_BV, finite_BV = step.log_p_BV.exp() * shared_V, step.proxy_BV.masked_fill(~shared_V, 0.0)
    mean_B = torch.linalg.vecdot(probs_BV, finite_BV) / probs_BV.sum(-1).clamp(min=LEAST_MASS)
    return torch.where(shared_V, finite_BV, mean_B[:, None])
