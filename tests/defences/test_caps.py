"""Caps against their definitions, on random and on adverse rows."""

import pytest
import torch

from ads.defences.caps import capped, kl, tilted
from ads.defences.scores import RULED_OUT

V = 500


def rows(num, kind, seed=0):
    """(log p, s) of rows: of a flat or a peaked teacher, scores like Delta's, a proxy's log-probabilities, or
    those of contrastive decoding, which rule out all tokens off a plausible set."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(num, 1, generator=generator) * 8
    log_p_BV = torch.log_softmax(torch.randn(num, V, generator=generator) * sharpness, -1)
    score_BV = torch.randn(num, V, generator=generator)
    if kind == "proxy":
        score_BV = torch.log_softmax(log_p_BV + 2 * score_BV, -1)
    if kind == "contrastive":
        score_BV = score_BV.masked_fill(log_p_BV < log_p_BV.amax(-1, keepdim=True) - 2.3, RULED_OUT)
    return log_p_BV, score_BV


def definition(log_p_BV, score_BV, lam_B):
    """KL(q || p) in float64, term by term."""
    log_p_BV, score_BV = log_p_BV.double(), score_BV.double()
    q_BV = torch.softmax(log_p_BV + lam_B.double()[:, None] * score_BV, -1)
    return torch.where(q_BV > 0, q_BV * (q_BV.log() - log_p_BV), 0.0).sum(-1)


@pytest.mark.parametrize("kind", ("delta", "proxy", "contrastive"))
def test_kl_is_the_definition_s(kind):
    log_p_BV, score_BV = rows(200, kind)
    for lam in (0.0, 0.01, 0.5, 4.0):
        lam_B = torch.full((200,), lam)
        found = kl(log_p_BV, score_BV, lam_B)
        wanted = definition(log_p_BV, score_BV, lam_B)
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("may_ask", (True, False))
@pytest.mark.parametrize("kind", ("delta", "proxy", "contrastive"))
@pytest.mark.parametrize("sign", (1, -1))
def test_max_kl_is_met_and_by_the_largest_lam(kind, sign, may_ask):
    if kind == "contrastive" and sign < 0:
        pytest.skip("negated, what is ruled out would be all that is left")
    log_p_BV, score_BV = rows(300, kind)
    for most in (0.003, 0.08, 1.0):
        lam_B = capped(log_p_BV, score_BV, sign * 6.0, max_kl=most, may_ask=may_ask)
        assert ((lam_B * sign >= 0) & (lam_B.abs() <= 6.0)).all()
        found = definition(log_p_BV, score_BV, lam_B)
        assert (found <= most * (1 + 1e-4)).all()
        # of contrastive, ruling tokens out may cost too much by itself
        is_none = lam_B == 0
        least = definition(log_p_BV, score_BV, torch.full_like(lam_B, sign * 6e-4))
        assert (least[is_none] > most * 0.999).all() and (kind == "contrastive" or not is_none.any())
        rest = (lam_B.abs() < 6.0) & ~is_none
        assert rest.sum() > (5 if kind == "contrastive" else 50)
        assert ((found[rest] - most).abs() <= 1e-3 * most).all()
        beyond = definition(log_p_BV, score_BV, 1.02 * lam_B)[rest]
        # where KL hardly grows any more, 2 % of lam are less than what it is met to
        assert (beyond > found[rest]).all() and (beyond > most).float().mean() > 0.9


@pytest.mark.parametrize("kind", ("delta", "proxy", "contrastive"))
def test_the_teacher_s_first_token_stays_the_first_by_the_largest_lam(kind):
    log_p_BV, score_BV = rows(10_000, kind)
    first = log_p_BV.argmax(-1)
    lam_B = capped(log_p_BV, score_BV, 3.0, keep_top1=True)
    assert (tilted(log_p_BV, score_BV, lam_B).argmax(-1) == first).all()
    is_capped = (lam_B < 3.0) & (lam_B > 0)
    assert is_capped.sum() > 500
    moved = tilted(log_p_BV.double(), score_BV.double(), 1.02 * lam_B.double()).argmax(-1) != first
    assert moved[is_capped].all()


def test_without_a_cap_lam_is_lam_and_both_caps_hold_together():
    log_p_BV, score_BV = rows(300, "delta")
    assert (capped(log_p_BV, score_BV, 0.7) == 0.7).all()
    both = capped(log_p_BV, score_BV, 6.0, max_kl=0.08, keep_top1=True)
    one, other = capped(log_p_BV, score_BV, 6.0, max_kl=0.08), capped(log_p_BV, score_BV, 6.0, keep_top1=True)
    torch.testing.assert_close(both, torch.minimum(one, other), rtol=2e-3, atol=0)
