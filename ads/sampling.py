"""The sampling distribution of a defended teacher, and how a token is drawn from it.

    q(x) is proportional to exp(log p_T(x) / tau + lam_t s(x))          paper eq. 11, Algorithm 1

The score s of antidistillation sampling is Delta (delta/exact.py); those of other defences are in defences/.
lam_t is lam, or the largest up to lam that a cap allows (defences/caps.py).

p_T: the teacher; Delta: delta/exact.py, or delta/central.py. Scores and probabilities are float32, the CDF
float64. Shapes: B rows, V vocabulary (token ids of the tokenizer), K ranked tokens.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ads.defences import caps

# constants of the SplitMix64 generator (Steele et al., OOPSLA 2014), as int64 with the same bits
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64
NUM_RANKED = 1024  # top_p without top_k is looked for among this many scores first


@dataclass(frozen=True)
class Step:
    """What the score of B rows is made of: log p_T (B, V) at temperature 1, what the defence's proxy gives
    (B, V), the rows' keys and steps (see `sample`), and the settings."""

    log_p_BV: torch.Tensor
    proxy_BV: torch.Tensor
    keys_B: torch.Tensor
    steps_B: torch.Tensor
    settings: "Sampling"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: tau = 0 is greedy, top_k = 0 and top_p = 1 are off, lam = 0 needs no proxy.

    score: s (B, V), finite, of a Step; None: what the proxy gives, Delta. shared_V: ids that mean the same to
    the proxy, None where all do.
    max_kl (nats), keep_top1: caps.
    """

    tau: float
    lam: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    score: Callable | None = None
    max_kl: float | None = None
    keep_top1: bool = False
    plausibility: float = 0.1  # of the contrastive score
    shared_V: torch.Tensor | None = field(default=None, compare=False)


GREEDY = Sampling(tau=0.0)


def log_probs(logits_BR, allowed_V):
    """Log-probabilities (nats, float32, (B, V)) over the allowed ids, -inf elsewhere; R >= V logits given."""
    logits_BV = logits_BR[:, : len(allowed_V)].to(torch.float32, copy=True)
    return torch.log_softmax(logits_BV.masked_fill_(~allowed_V, -torch.inf), dim=-1)


def sample(log_probs_BV, proxy_BV, sampling, keys_B, steps_B):
    """(a token id per row, (B,) int64; the Adjusted that it was drawn from).

    proxy_BV: what the defence's proxy gives, Delta or log-probabilities; None where lam = 0. keys_B and
    steps_B are int64: a row's key (see `row_key`) and how many tokens it has sampled so far. At tau = 0:
    argmax of log p_T + lam_t s.
    """
    adjusted = adjust(log_probs_BV, proxy_BV, sampling, keys_B, steps_B)
    if sampling.tau == 0:
        return adjusted.log_q_BV.argmax(-1), adjusted
    log_q_BV = truncate(adjusted.log_q_BV, sampling.top_k, sampling.top_p)
    return draw(log_q_BV, uniforms(keys_B, steps_B)), adjusted


@dataclass(frozen=True)
class Adjusted:
    """Eq. 11 of B rows before truncation: log q (B, V) up to a constant per row, the score (B, V), lam_t (B,)
    and KL(q || p) (B,) in nats; the last three are None without a defence."""

    log_q_BV: torch.Tensor
    score_BV: torch.Tensor | None = None
    lam_B: torch.Tensor | None = None
    kl_B: torch.Tensor | None = None


def adjust(log_probs_BV, proxy_BV, sampling, keys_B, steps_B):
    """log p_T / tau + lam_t s (tau = 0: tau = 1), with its price. See `sample` for the arguments."""
    log_p_BV = log_probs_BV if sampling.tau in (0, 1) else log_probs_BV / sampling.tau
    if proxy_BV is None:
        return Adjusted(log_p_BV)
    step = Step(log_probs_BV, proxy_BV, keys_B, steps_B, sampling)
    score_BV = sampling.score(step) if sampling.score else proxy_BV
    if sampling.max_kl is None and not sampling.keep_top1:
        lam_B = log_p_BV.new_full((len(log_p_BV),), sampling.lam)
        log_q_BV = log_p_BV.add(score_BV, alpha=sampling.lam)
        kl_B = caps.kl_of(log_q_BV, score_BV, lam_B)
        if sampling.tau not in (0, 1):  # log p is not normalised
            kl_B = kl_B + caps.log_normaliser(log_p_BV)
        return Adjusted(log_q_BV, score_BV, lam_B, kl_B.clamp_(min=0.0))
    if sampling.tau not in (0, 1):
        log_p_BV = torch.log_softmax(log_p_BV, -1)
    limits = sampling.max_kl, sampling.keep_top1, may_ask(log_p_BV.device)
    lam_B = caps.capped(log_p_BV, score_BV, sampling.lam, *limits)
    log_q_BV = caps.tilted(log_p_BV, score_BV, lam_B)
    kl_B = caps.kl_of(log_q_BV, score_BV, lam_B).clamp_(min=0.0)
    return Adjusted(log_q_BV, score_BV, lam_B, kl_B)


def truncate(scores_BV, top_k, top_p):
    """Keep the top_k highest scores, then the nucleus, the fewest that hold top_p of them; -inf elsewhere.

    A token tied with the last one kept is kept too, so that the outcome is a function of the scores alone.
    """
    ranked_BK = None
    if 0 < top_k < scores_BV.shape[-1]:
        ranked_BK = scores_BV.topk(top_k, dim=-1)
        scores_BV = scores_BV.masked_fill(scores_BV < ranked_BK.values[:, -1:], -torch.inf)
    if top_p < 1:
        edge_B1 = nucleus_edge(scores_BV, ranked_BK, top_p)
        scores_BV = scores_BV.masked_fill(scores_BV < edge_B1, -torch.inf)
    return scores_BV


def nucleus_edge(scores_BV, ranked_BK, top_p):
    """The least score (B, 1) of the nucleus; ranked_BK: all scores above -inf, falling, or None."""
    log_probs_BV = torch.log_softmax(scores_BV, -1)
    if ranked_BK is None:
        ranked_BK = highest(scores_BV, log_probs_BV, top_p)
    mass_BK = log_probs_BV.gather(-1, ranked_BK.indices).exp().cumsum(-1)
    last_B1 = (mass_BK[:, :-1] < top_p).sum(-1, keepdim=True)  # 0 in a row of NaN
    return scores_BV.gather(-1, ranked_BK.indices.gather(-1, last_B1))


def highest(scores_BV, log_probs_BV, top_p):
    """At least the scores of the nucleus in falling order, (values, indices), where top_k does not bound it.

    The vocabulary is sorted only for rows so flat that their nucleus goes beyond NUM_RANKED tokens. To ask
    whether there are such rows would make the host wait for a GPU, which sorts instead.
    """
    if may_ask(scores_BV.device):
        ranked_BK = scores_BV.topk(min(NUM_RANKED, scores_BV.shape[-1]), dim=-1)
        if not (log_probs_BV.gather(-1, ranked_BK.indices).exp().sum(-1) < top_p).any():
            return ranked_BK
    return scores_BV.sort(dim=-1, descending=True)


def may_ask(device) -> bool:
    """Whether the host can look at values without waiting for the device."""
    return device.type == "cpu"


def draw(scores_BV, uniforms_B):
    """Inverse-CDF sample of softmax(scores) per row, (B,) int64.

    The CDF runs in order of token id, not of probability: rounding noise in the scores then moves the
    boundaries by as little as the noise itself, so a trace hardly depends on how rows were batched.
    """
    cdf_BV = torch.softmax(scores_BV, dim=-1).double().cumsum(-1)
    targets_B1 = uniforms_B[:, None] * cdf_BV[:, -1:]
    tokens_B = torch.searchsorted(cdf_BV, targets_B1, right=True).squeeze(-1)
    return tokens_B.clamp(max=cdf_BV.shape[-1] - 1)  # it is V in a row of NaN, which the caller reports


def row_key(seed: int, problem_id: str) -> int:
    """The 64-bit key (as a signed int) of a problem's random numbers."""
    digest = hashlib.sha256(f"{seed}\n{problem_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniforms(keys_B, steps_B):
    """One float64 in [0, 1 - 2^-32] per (key, step): `uniform * total` stays below the total, so that a token
    of probability 0 is never drawn."""
    return shift_right(random_bits(keys_B, steps_B), 32) * torch.tensor(2.0**-32, dtype=torch.float64)


def random_bits(keys, counters):
    """64 random bits (int64, whose products wrap around) per (key, counter): SplitMix64 seeded by the key."""
    state = keys + (counters + 1) * GOLDEN
    state = (state ^ shift_right(state, 30)) * MIX_1
    state = (state ^ shift_right(state, 27)) * MIX_2
    return state ^ shift_right(state, 31)


def shift_right(values, bits):
    """Logical right shift of int64 (torch's own shift copies the sign)."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
