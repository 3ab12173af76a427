"""The one-step test, the random direction and the contrasts, against a few lines of plain torch."""

import dataclasses
import functools

import pytest
import torch
from conftest import byte_tokenizer, tiny_model
from helpers_models import (
    EOS,
    V,
    ads_models,
    decode,
    gradient_of,
    mean_loss,
    model_with_gradient,
    plain_models,
    proxy_gradient,
    requests,
    sequences,
)

from ads import chat, sampling
from ads.decode.cached_model import CachedModel
from ads.decode.engine import Models
from ads.decode.replay import replay
from ads.defences.scores import permuted
from ads.delta import effects, gradient
from ads.delta.exact import ExactDerivative
from ads.dual.factors import random_tensor
from ads.sampling import Sampling, Step
from ads.stage.world import World

pytestmark = pytest.mark.compiled

ALONE = World(0, 1, "cpu")
DISTRIBUTION = Sampling(tau=0.7, lam=0.4)


def test_one_step_is_a_step_of_descent_of_the_length_asked_for():
    taught, holdout = sequences(6, seed=1), sequences(5, seed=2)
    found = effects.one_step(tiny_model(seed=3, spread=0.1), taught, holdout, 0.05, ALONE)
    model = tiny_model(seed=3, spread=0.1)
    before = mean_loss(model, holdout).item()
    mean_loss(model, taught).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.05 * p.grad / norm
    after = mean_loss(model, holdout).item()
    assert found["loss_before"] == pytest.approx(before, abs=2e-6)
    assert found["change"] == pytest.approx(after - before, abs=5e-6) and abs(after - before) > 1e-3
    assert (found["n"], found["step_length"]) == (6, 0.05)


def test_one_step_on_the_holdout_traces_themselves_lowers_their_loss_by_the_gradient_s_norm():
    """To first order; an ascent would raise it."""
    model, _ = model_with_gradient()
    norm = gradient.total_norm(gradient.norms(model))
    rows = sequences()
    found = effects.one_step(tiny_model(seed=3, spread=0.1), rows, rows, 1e-3, ALONE)
    assert found["change"] == pytest.approx(-1e-3 * norm, rel=0.02)


def test_random_direction_has_the_gradient_s_norms_and_hangs_on_seed_and_name_alone():
    model, _ = model_with_gradient()
    g = gradient_of(model)
    draw = functools.partial(random_tensor, g.__getitem__, 7)
    cosines = []
    for name, tensor in g.items():
        found = draw(name)
        assert found.norm().item() == pytest.approx(tensor.norm().item(), rel=1e-5)
        assert torch.equal(found, draw(name))
        assert not torch.allclose(found, random_tensor(g.__getitem__, 8, name))
        cosines.append(torch.cosine_similarity(found.flatten(), tensor.flatten(), dim=0).item())
    one, other = [name for name in g if "layernorm" in name][:2]
    same = {one: g[one], other: g[one]}
    assert not torch.allclose(*(random_tensor(same.__getitem__, 7, name) for name in same))
    assert abs(sum(cosines) / len(cosines)) < 0.15


@torch.no_grad()
def uncached_thoughts(models, distribution, row, ids):
    """(clean, adjusted, Delta) of each response token, from whole forward passes."""
    whole = torch.tensor([row.prompt_ids + ids])
    response = slice(len(row.prompt_ids) - 1, -1)
    log_p_TV = torch.log_softmax(models.teacher.model(whole).logits[0, response], -1)
    plus_TV, minus_TV = (
        sampling.log_probs(m.model(whole).logits[0, response], models.proxy.shared_V)
        for m in models.proxy.models
    )
    delta_TV = torch.where(models.proxy.shared_V, (plus_TV - minus_TV) / (2 * models.proxy.eps), 0.0)
    clean_TV = (log_p_TV / distribution.tau).softmax(-1)
    adjusted_TV = (log_p_TV / distribution.tau + distribution.lam * delta_TV).softmax(-1)
    index_T1 = torch.tensor(ids)[:, None]
    return torch.cat([values.gather(1, index_T1) for values in (clean_TV, adjusted_TV, delta_TV)], dim=1)


def exact_models():
    """With a few ids that the proxy does not know."""
    read, shared_V = proxy_gradient().__getitem__, torch.ones(V, dtype=torch.bool)
    shared_V[[2, 90]] = False
    delta = ExactDerivative(tiny_model("qwen2", seed=3), read, shared_V)
    return Models(CachedModel(tiny_model("qwen2")), delta, shared_V | True, EOS)


def judge_plainly(models, distribution, row, ids):
    """Token by token, each with one of the decoder's steps, as replay once did."""
    models.allocate(1, len(row.prompt_ids) + len(ids))
    logits, delta = models.teacher.prefill([row.prompt_ids], 0), models.proxy.prefill([row.prompt_ids], 0)
    judged = []
    for step, token in enumerate(ids):
        if step:
            length = len(row.prompt_ids) + step - 1
            last = torch.tensor([ids[step - 1]]), torch.tensor([length]), length
            logits, delta = models.teacher.step(*last), models.proxy.step(*last)
        log_probs = torch.log_softmax(logits.float(), -1)
        given = delta
        if distribution.score is permuted:
            key = torch.tensor([sampling.row_key(1, row.id)])
            given = permuted(Step(log_probs, delta, key, torch.tensor([step]), distribution))
        scores = log_probs / distribution.tau, log_probs / distribution.tau + distribution.lam * given
        judged.append([*(s.softmax(-1)[0, token].item() for s in scores), given[0, token].item()])
    return torch.tensor(judged)


def sampled(make_models, num_new=12):
    """Requests and their responses."""
    rows = requests(num_new=num_new)
    return rows, [c.ids for _, c in sorted(decode(make_models(), DISTRIBUTION, rows, 16).items())]


@pytest.mark.parametrize("num_at_once", (5, 256))
@pytest.mark.parametrize("make_models", (exact_models, functools.partial(ads_models, 1e-2)))
@pytest.mark.parametrize("score", (None, permuted))
def test_replay_is_what_was_thought_token_by_token(num_at_once, make_models, score, monkeypatch):
    """It took a step per token, on one process while the others waited: now a pass per REPLAYED_TOKENS."""
    monkeypatch.setattr("ads.decode.replay.REPLAYED_TOKENS", num_at_once)
    rows, responses = sampled(make_models)
    distribution = dataclasses.replace(DISTRIBUTION, score=score)
    assert len({len(ids) for ids in responses}) > 2
    models, passes = make_models(), []
    models.teacher.model.register_forward_hook(lambda *_: passes.append(1))
    for row, ids in zip(rows, responses, strict=True):
        found = torch.tensor(replay(models, distribution, 1, row, ids))
        wanted = judge_plainly(make_models(), distribution, row, ids)
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)  # of Delta at eps: 1e-5 / 2 eps
    assert len(passes) == sum(1 + -(-(len(ids) - 1) // num_at_once) for ids in responses)


def test_replay_equals_uncached_passes():
    rows, responses = sampled(functools.partial(ads_models, 1e-2))
    models = ads_models(1e-2)
    for row, ids in zip(rows, responses, strict=True):
        found = torch.tensor(replay(models, DISTRIBUTION, 1, row, ids))
        wanted = uncached_thoughts(models, DISTRIBUTION, row, ids)
        assert torch.allclose(found, wanted, rtol=2e-3, atol=2e-3)  # of Delta: 1e-5 / 2 eps


def test_contrasts_are_the_sampled_traces_beside_clean_ones_of_the_same_random_numbers():
    rows, tokenizer = requests(num_new=12), byte_tokenizer()
    ads = decode(ads_models(), DISTRIBUTION, rows, 16)
    clean = decode(plain_models(), Sampling(DISTRIBUTION.tau), rows, 16)
    table = [
        {"id": r.id, "problem": "p", "solution": "s", "prompt_ids": r.prompt_ids, "max_new_tokens": 12}
        | {"response_ids": ads[r.id].ids, "finished": ads[r.id].finished}
        for r in rows
    ]
    found = effects.contrasts(ads_models(), DISTRIBUTION, 1, tokenizer, table, is_short, 3)
    assert [problem["id"] for problem in found] == [r.id for r in rows]
    for problem in found:
        for side, completions in (("clean", clean), ("defended", ads)):
            wanted = completions[problem["id"]]
            text = "".join(token[0] for token in problem[side]["tokens"])
            assert text == tokenizer.decode(wanted.ids) and len(problem[side]["tokens"]) == len(wanted.ids)
            assert problem[side]["finished"] == wanted.finished
            graded = chat.response_text(tokenizer, wanted.ids, frozenset(range(6)))
            assert problem[side]["is_correct"] == is_short(problem, graded)
    assert {p[side]["is_correct"] for p in found for side in ("clean", "defended")} == {True, False}
    tokens = [token for problem in found for token in problem["defended"]["tokens"]]
    assert max(abs(with_delta - clean) for _, clean, with_delta, _ in tokens) > 0.1


def test_contrasts_of_a_defence_without_a_proxy_have_the_teacher_s_probabilities_alone():
    """Corrupted results and texts that were cut could not be seen beside what the teacher wrote."""
    rows, tokenizer = requests(num_new=12), byte_tokenizer()
    clean = decode(plain_models(), Sampling(DISTRIBUTION.tau), rows, 16)
    table = [
        {"id": r.id, "problem": "p", "solution": "s", "prompt_ids": r.prompt_ids, "max_new_tokens": 12}
        | {"response_ids": clean[r.id].ids[:3], "finished": False}
        for r in rows
    ]
    found = effects.contrasts(plain_models(), Sampling(DISTRIBUTION.tau), 1, tokenizer, table, is_short, 3)
    model = tiny_model("qwen2")
    for problem, row in zip(found, rows, strict=True):
        whole, cut = (problem[side]["tokens"] for side in ("clean", "defended"))
        ids = clean[row.id].ids
        with torch.no_grad():
            logits_TV = model(torch.tensor([row.prompt_ids + ids])).logits[0, len(row.prompt_ids) - 1 : -1]
        probabilities_TV = (logits_TV[:, :V] / DISTRIBUTION.tau).softmax(-1)
        wanted = probabilities_TV.gather(1, torch.tensor(ids)[:, None]).flatten().tolist()
        assert [token[1] for token in whole] == pytest.approx(wanted, rel=2e-3)
        assert [token for token in cut] == whole[: len(cut)] and {len(token) for token in whole} == {2}
        assert problem["defended"]["replaced"] == []


def is_short(row, text):
    return len(text) < 10


def test_token_texts_put_together_are_the_text():
    """A character of several bytes once came out as several replacement characters."""
    tokenizer = byte_tokenizer()
    text = "caf\u00e9 \U0001f600 = 5\u20ac<|end|>"
    ids = chat.encode(tokenizer, text)
    texts = chat.token_texts(tokenizer, ids)
    assert len(texts) == len(ids) and "".join(texts) == text and texts[3:5] == ["", "\u00e9"]
    assert "".join(chat.token_texts(tokenizer, ids[:4])) == tokenizer.decode(ids[:4])
