"""Defended decoding against a plain loop without caches: whole forwards, formulas written out, float32."""

import dataclasses
import math

import pytest
import torch
from conftest import tiny_model
from helpers_models import EOS, V, decode, requests, same

from ads import sampling
from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models
from ads.defences import scores
from ads.delta.plain import PlainProxy
from ads.sampling import Sampling

pytestmark = pytest.mark.compiled

SHARED_V = torch.ones(V, dtype=torch.bool)
SHARED_V[[2, 90]] = False  # ids that the proxy does not know
POE = Sampling(0.8, 0.7, top_k=20, top_p=0.95, score=scores.poe, shared_V=SHARED_V)
SETTINGS = {
    "poe": POE,
    "poe at tau 0": dataclasses.replace(POE, tau=0.0),
    "poe, negative": dataclasses.replace(POE, lam=-0.7),
    "gated_poe": dataclasses.replace(POE, lam=0.2, score=scores.gated_poe),
    "contrastive": dataclasses.replace(POE, score=scores.contrastive),
    "max_kl": dataclasses.replace(POE, lam=2.0, max_kl=0.05),
    "keep_top1": dataclasses.replace(POE, lam=2.0, keep_top1=True),
    "both caps, flat": dataclasses.replace(POE, tau=1.0, lam=3.0, top_k=0, max_kl=0.2, keep_top1=True),
}


def plain_proxy_models(kind="qwen2"):
    proxy = PlainProxy(tiny_model(kind, seed=3), SHARED_V)
    return Models(CachedModel(tiny_model(kind)), proxy, SHARED_V | True, EOS)


def written_out(settings, log_p_V, log_proxy_V):
    """(log q, lam_t, KL) of one step, of plain formulas and bisection, in float64."""
    known = log_proxy_V > -math.inf
    fill = (log_p_V.exp() * log_proxy_V)[known].sum() / log_p_V.exp()[known].sum()
    score_V = torch.where(known, log_proxy_V, fill)
    if settings.score is scores.gated_poe:
        score_V = -(log_proxy_V.exp() * log_proxy_V)[known].sum() * score_V
    if settings.score is scores.contrastive:
        score_V = torch.where(log_p_V >= log_p_V.max() + math.log(0.1), -score_V, scores.RULED_OUT)
    base_V = torch.log_softmax(log_p_V / (settings.tau or 1.0), -1)
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (
            1.0 if high == 1.0 and is_allowed(settings, base_V, score_V, settings.lam) else (low + high) / 2
        )
        if is_allowed(settings, base_V, score_V, share * settings.lam):
            low = share
        else:
            high = share
        if low == 1.0:
            break
    log_q_V = torch.log_softmax(base_V + low * settings.lam * score_V, -1)
    return log_q_V, low * settings.lam, kl(log_q_V, base_V)


def is_allowed(settings, base_V, score_V, lam):
    log_q_V = torch.log_softmax(base_V + lam * score_V, -1)
    keeps = not settings.keep_top1 or log_q_V.argmax() == base_V.argmax()
    return keeps and (settings.max_kl is None or kl(log_q_V, base_V) <= settings.max_kl)


def kl(log_q_V, log_p_V):
    return torch.where(log_q_V.exp() > 0, log_q_V.exp() * (log_q_V - log_p_V), 0.0).sum().item()


@torch.no_grad()
def decode_uncached(models, settings, row, seed=1):
    """(ids, log p_T of them, sums of KL and lam_t) of one row."""
    key, ids, sums = torch.tensor([sampling.row_key(seed, row.id)]), list(row.prompt_ids), [0.0, 0.0, 0.0]
    of_q = dataclasses.replace(settings, tau=float(settings.tau > 0))  # which has its tau already
    for step in range(row.max_new_tokens):
        logits_V, proxy_V = (
            m.model(torch.tensor([ids])).logits[0, -1] for m in (models.teacher, models.proxy.models[0])
        )
        log_p_V = torch.log_softmax(logits_V.double(), -1)
        proxy_V = proxy_V.masked_fill(~models.proxy.shared_V, -math.inf)
        log_q_V, lam, price = written_out(settings, log_p_V, torch.log_softmax(proxy_V.double(), -1))
        ids.append(sampling.sample(log_q_V[None].float(), None, of_q, key, torch.tensor([step]))[0].item())
        sums = [a + b for a, b in zip(sums, (log_p_V[ids[-1]].item(), price, lam), strict=True)]
        if ids[-1] in EOS:
            break
    return ids[len(row.prompt_ids) :], *sums


@pytest.mark.parametrize("name", SETTINGS)
def test_defended_decoding_is_the_plain_loop(name):
    settings, models = SETTINGS[name], plain_proxy_models()
    found = decode(models, settings, requests(), batch_size=3)
    assert len({len(c.ids) for c in found.values()}) > 1, "rows must end at different steps"
    num_steps = num_capped = 0
    for row in requests():
        ids, log_prob, price, lam = decode_uncached(models, settings, row)
        ours = found[row.id]
        assert ours.ids == ids and ours.log_prob == pytest.approx(log_prob, abs=2e-4)
        # keep_top1 stays a thousandth below the tie
        assert ours.price[:2] == pytest.approx((price, lam), rel=3e-3, abs=1e-4)
        num_steps, num_capped = num_steps + len(ids), num_capped + ours.price[2]
    is_capped = settings.max_kl is not None or settings.keep_top1
    assert (0.2 * num_steps < num_capped <= num_steps) if is_capped else num_capped == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_batch_size_and_order_and_who_decodes_a_row_change_nothing(name):
    settings = SETTINGS[name]
    one = decode(plain_proxy_models(), settings, requests(), batch_size=1)
    other = decode(plain_proxy_models(), settings, requests()[::-1], batch_size=5)
    same(one, other)
    as_to_two = [decode(plain_proxy_models(), settings, requests()[rank::2], batch_size=2) for rank in (0, 1)]
    same(one, as_to_two[0] | as_to_two[1])
    for i, completion in one.items():
        assert completion.price == pytest.approx(other[i].price, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("score", (scores.poe, scores.gated_poe, scores.contrastive))
def test_lam_zero_is_the_teacher_s_own_sampling(score):
    models = plain_proxy_models()
    plain = Models(models.teacher, None, models.allowed_V, models.eos)
    wanted = decode(plain, Sampling(0.8, 0.0, 20, 0.95), requests(), batch_size=3)
    same(decode(models, dataclasses.replace(POE, lam=0.0, score=score), requests(), batch_size=3), wanted)


def test_a_proxy_whose_logits_are_not_finite_is_named():
    models = plain_proxy_models()
    with torch.no_grad():
        models.proxy.models[0].model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="row., response token 0: the proxy.*not finite"):
        decode(models, POE, requests(), batch_size=3)
