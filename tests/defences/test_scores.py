"""Scores of a plain proxy against their formulas."""

import math

import pytest
import torch

from ads.defences import scores
from ads.sampling import Sampling, Step

V = 300


def step(log_p, log_proxy, **settings):
    return Step(log_p, log_proxy, None, None, Sampling(1.0, 0.5, **settings))


def pair(num=40, seed=0):
    """(teacher's, proxy's) logits of rows."""
    generator = torch.Generator().manual_seed(seed)
    z_T = 3 * torch.randn(num, V, generator=generator)
    return z_T, z_T / 2 + 2 * torch.randn(num, V, generator=generator)


@pytest.mark.parametrize("gamma", (0.1, 0.3, 0.5, 0.7, 0.9))
def test_poe_is_a_mean_of_logits(gamma):
    """(1 - gamma) z_T + gamma z_P at temperature t is tau = t / (1 - gamma), lam = gamma / t."""
    z_T, z_P = pair()
    for t in (0.6, 1.0):
        wanted = torch.softmax(((1 - gamma) * z_T + gamma * z_P) / t, -1)
        log_p, log_proxy = torch.log_softmax(z_T, -1), torch.log_softmax(z_P, -1)
        score = scores.poe(step(log_p, log_proxy))
        found = torch.softmax(log_p / (t / (1 - gamma)) + gamma / t * score, -1)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_gated_poe_is_poe_times_the_proxy_s_entropy():
    log_p, log_proxy = (torch.log_softmax(z, -1) for z in pair())
    entropy = torch.distributions.Categorical(logits=log_proxy).entropy()
    torch.testing.assert_close(scores.gated_poe(step(log_p, log_proxy)), entropy[:, None] * log_proxy)


def test_contrastive_never_leaves_its_plausible_set():
    log_p, log_proxy = (torch.log_softmax(z, -1) for z in pair(2000))
    score = scores.contrastive(step(log_p, log_proxy, plausibility=0.1))
    is_plausible = log_p >= log_p.amax(-1, keepdim=True) + math.log(0.1)
    assert torch.equal(score[is_plausible], -log_proxy[is_plausible])
    for lam in (1e-3, 0.5, 8.0):
        q = torch.softmax(log_p + lam * score, -1)
        assert (q[~is_plausible] == 0).all() and q.isfinite().all()
    assert torch.equal(torch.softmax(log_p + 0.0 * score, -1), torch.softmax(log_p, -1))


@pytest.mark.parametrize("score", (scores.poe, scores.gated_poe))
def test_an_id_that_the_proxy_does_not_know_keeps_about_its_probability(score):
    """The teacher's end of turn may be one: at -inf no trace would ever end, at 0 each would at once."""
    log_p, log_proxy = (torch.log_softmax(z, -1) for z in pair(500))
    log_proxy[:, 7] = -torch.inf
    others = torch.arange(V) != 7
    found = score(step(log_p, log_proxy, shared_V=others))
    mean = (log_p.exp() * found)[:, others].sum(-1) / log_p.exp()[:, others].sum(-1)
    torch.testing.assert_close(found[:, 7], mean)
    small = torch.softmax(log_p + 1e-3 * found, -1)[:, 7] / log_p[:, 7].exp()
    torch.testing.assert_close(small, torch.ones_like(small), atol=1e-3, rtol=0)
