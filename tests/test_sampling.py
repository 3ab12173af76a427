"""The ADS distribution, truncation and the random numbers, against a few lines of plain torch."""

import pytest
import torch

from ads import sampling
from ads.defences.scores import permuted
from ads.sampling import Sampling, Step

V = 40


def scores(num_rows=6, seed=0, scale=3.0):
    return torch.randn(num_rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def keys(num_rows):
    return torch.tensor([sampling.row_key(1, f"p{i}") for i in range(num_rows)])


def test_log_probs_leave_out_rows_that_are_no_token():
    logits_BR = scores()
    allowed_V = torch.ones(V - 5, dtype=torch.bool)
    allowed_V[3] = False
    found_BV = sampling.log_probs(logits_BR, allowed_V)
    wanted_BV = torch.log_softmax(torch.cat([logits_BR[:, :3], logits_BR[:, 4 : V - 5]], dim=1), dim=-1)
    assert torch.allclose(torch.cat([found_BV[:, :3], found_BV[:, 4:]], dim=1), wanted_BV)
    assert (found_BV[:, 3] == -torch.inf).all()


@pytest.mark.parametrize("top_k,top_p", [(0, 1.0), (5, 1.0), (0, 0.8), (7, 0.6), (1, 1.0), (V + 9, 0.95)])
@pytest.mark.parametrize("num_ranked", [2, sampling.NUM_RANKED])
def test_truncation_equals_transformers(top_k, top_p, num_ranked, monkeypatch):
    """Top-k then top-p, with the meaning they have in transformers' warpers, whether few tokens hold top_p or
    not."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    monkeypatch.setattr(sampling, "NUM_RANKED", num_ranked)
    wanted_BV = scores()
    if top_k:
        wanted_BV = TopKLogitsWarper(top_k)(None, wanted_BV)
    if top_p < 1:
        wanted_BV = TopPLogitsWarper(top_p)(None, wanted_BV)
    assert torch.equal(sampling.truncate(scores(), top_k, top_p), wanted_BV)


def test_tied_tokens_share_their_fate():
    """In 16-bit logits ties are common; which tied token survives must not depend on a sorting algorithm."""
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert (sampling.truncate(tied, 2, 1.0) > -torch.inf).tolist() == [[False, True, True, True, False]]
    assert (sampling.truncate(tied, 0, 0.3) > -torch.inf).tolist() == [[False, True, True, True, False]]


def sample(*given):
    return sampling.sample(*given)[0]


def test_draws_follow_the_antidistillation_distribution():
    """Frequencies over 200,000 draws against softmax(log p / tau + lam Delta), formula written out."""
    log_p, delta = torch.log_softmax(scores(1), -1), scores(1, seed=1)
    wanted_V = torch.softmax(log_p / 0.7 + 0.5 * delta, -1)[0]
    n = 200_000
    key_n, step_n = torch.full((n,), sampling.row_key(7, "x")), torch.arange(n)
    tokens_n = sample(log_p.expand(n, -1), delta.expand(n, -1), Sampling(tau=0.7, lam=0.5), key_n, step_n)
    found_V = torch.bincount(tokens_n, minlength=V) / n
    assert (found_V - wanted_V).abs().max() < 5 * (0.25 / n) ** 0.5


def test_lam_zero_is_plain_temperature_sampling_bit_for_bit():
    log_p, delta = torch.log_softmax(scores(), -1), scores(seed=1)
    steps = torch.zeros(6, dtype=torch.int64)
    for tau in (0.0, 0.6, 2.0):
        plain = sample(log_p, None, Sampling(tau, 0.0, 10, 0.9), keys(6), steps)
        with_delta = sample(log_p, delta, Sampling(tau, 0.0, 10, 0.9), keys(6), steps)
        assert torch.equal(plain, with_delta)


def test_a_constant_in_delta_changes_nothing():
    log_p, delta = torch.log_softmax(scores(), -1).double(), scores(seed=1).double()
    distribution = Sampling(0.8, 0.6, 20, 0.9)
    steps = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(
        sample(log_p, delta, distribution, keys(6), steps),
        sample(log_p, delta + 4.0, distribution, keys(6), steps),
    )


def test_scaling_the_gradient_is_scaling_lam():
    log_p, delta = torch.log_softmax(scores(), -1), scores(seed=1)
    steps = torch.zeros(6, dtype=torch.int64)
    assert torch.equal(
        sample(log_p, 4 * delta, Sampling(1.0, 0.125), keys(6), steps),
        sample(log_p, delta, Sampling(1.0, 0.5), keys(6), steps),
    )


def test_greedy_is_the_argmax_of_log_p_plus_lam_delta():
    log_p, delta = torch.log_softmax(scores(), -1), scores(seed=1)
    tokens = sample(log_p, delta, Sampling(0.0, 0.7, 1, 0.1), keys(6), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(tokens, (log_p + 0.7 * delta).argmax(-1))


def splitmix64(seed, step):
    """The generator written with Python's own integers."""
    mask = (1 << 64) - 1
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_uniforms_are_the_splitmix64_stream():
    assert splitmix64(1234567, 0) == 6457827717110365317, "the published first output for this seed"
    key_n = torch.tensor([sampling.row_key(s, "gsm8k/train/5") for s in range(50)])
    step_n = torch.arange(50) * 37
    wanted = [(splitmix64(k, s) >> 32) / 2**32 for k, s in zip(key_n.tolist(), step_n.tolist(), strict=True)]
    assert sampling.uniforms(key_n, step_n).tolist() == wanted


def test_a_token_of_probability_zero_is_never_drawn():
    scores_BV = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 0.5, 1 - 2**-32):
        token = sampling.draw(scores_BV, torch.tensor([uniform], dtype=torch.float64)).item()
        assert token == (1 if uniform < 0.5 else 3)


def test_rounding_noise_moves_no_draw_far():
    """The CDF runs in id order: near-equal probabilities that swap ranks must not swap tokens."""
    log_p = torch.log_softmax(
        torch.randn(500, V, generator=torch.Generator().manual_seed(3)).round(decimals=1), -1
    )
    steps = torch.zeros(500, dtype=torch.int64)
    noisy = log_p + 1e-6 * torch.randn(500, V, generator=torch.Generator().manual_seed(4))
    distribution = Sampling(1.0)
    same = sample(log_p, None, distribution, keys(500), steps) == sample(
        noisy, None, distribution, keys(500), steps
    )
    assert same.all()


def permute(delta_BV, keys_B, steps_B):
    return permuted(Step(None, delta_BV, keys_B, steps_B, None))


def test_permuted_delta_is_a_permutation_with_random_signs():
    delta_BV, steps_B = scores(200), torch.arange(200)
    found_BV = permute(delta_BV, keys(200), steps_B)
    assert torch.equal(found_BV.abs().sort(-1).values, delta_BV.abs().sort(-1).values)
    assert abs((found_BV > 0).float().mean().item() - 0.5) < 0.02
    correlation = torch.corrcoef(torch.stack([found_BV.flatten(), delta_BV.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.05
    assert abs(torch.corrcoef(torch.stack([found_BV[:-1].flatten(), found_BV[1:].flatten()]))[0, 1]) < 0.05


def test_permutation_hangs_on_problem_and_step_alone():
    delta_1V = scores(1)
    one = permute(delta_1V, keys(3)[1:2], torch.tensor([4]))
    among = permute(delta_1V.expand(3, -1), keys(3), torch.tensor([9, 4, 4]))
    assert torch.equal(one[0], among[1])
    assert not torch.equal(among[1], among[2])  # another problem
    assert not torch.equal(one, permute(delta_1V, keys(3)[1:2], torch.tensor([5])))


def test_permuted_sampling_draws_from_the_permuted_delta():
    log_probs_BV, delta_BV = scores(500).log_softmax(-1), scores(500, seed=1)
    key_B, steps_B = keys(500), torch.zeros(500, dtype=torch.int64)
    found = sample(log_probs_BV, delta_BV, Sampling(0.8, 0.5, score=permuted), key_B, steps_B)
    permuted_BV = permute(delta_BV, key_B, steps_B)
    wanted = sample(log_probs_BV, permuted_BV, Sampling(0.8, 0.5), key_B, steps_B)
    plain = sample(log_probs_BV, delta_BV, Sampling(0.8, 0.5), key_B, steps_B)
    assert torch.equal(found, wanted) and not torch.equal(found, plain)
