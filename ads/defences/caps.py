"""How far a defence may go at a step: the largest lam_t up to lam that keeps a cap.

    q(x) is proportional to p(x) exp(lam_t s(x)),      p(x) to p_T(x)^(1 / tau)

max_kl       KL(q || p) may not exceed it. KL grows with |lam|, as its derivative is lam Var_q(s), so Newton's
             method within a bracket finds lam_t.
keep_top1    the teacher's most likely token stays the most likely. Of another token x, s(x) exceeds the first
             one's by r > 0 and log p(x) falls short of it by d, so lam_t is the least d / r.

Tensors of the vocabulary's size are few here, and made in place where they can be: on a CPU each costs as
much as a layer of a small model.

Shapes: B rows, V vocabulary. All float32; log p normalised, s finite.
"""

import torch

# max_kl is aimed at from below, so that rounding does not go beyond it
AIM, TOLERANCE = 1 - 1e-4, 8e-5  # as shares of max_kl
NUM_STEPS = 24  # of Newton's method at most; four or five are usual
MARGIN = 1e-3  # share of lam_t that keep_top1 stays below the tie
LEAST_SHARE = 1e-4  # of lam: where even less goes beyond max_kl, lam_t is 0
LEAST_RISE = 1e-30


def capped(log_p_BV, score_BV, lam, max_kl=None, keep_top1=False, may_ask=True):
    """lam_t (B,) of each row, from 0 to lam, which may be negative.

    may_ask: whether the host may look at values in between, to do no more than is needed; the outcome is the
    same within the tolerance.
    """
    lam_B = log_p_BV.new_full((len(log_p_BV),), lam)
    if keep_top1:
        lam_B = top1_bound(log_p_BV, score_BV, lam_B)
    if max_kl is not None:
        lam_B = kl_bound(log_p_BV, score_BV, lam_B, max_kl, may_ask)
    return lam_B


def tilted(log_p_BV, score_BV, lam_B):
    """log p + lam_t s (B, V), the logarithm of q up to a constant per row."""
    return torch.addcmul(log_p_BV, score_BV, lam_B[:, None])


def kl(log_p_BV, score_BV, lam_B):
    """KL(q || p) (B,) in nats."""
    return kl_of(tilted(log_p_BV, score_BV, lam_B), score_BV, lam_B).clamp_(min=0.0)


def kl_of(tilted_BV, score_BV, lam_B):
    """KL(q || p) (B,) in nats of log p + lam s; rounding may leave it just below 0."""
    q_BV, log_z_B = normalised(tilted_BV)
    mean_B = q_BV.mul_(score_BV).sum(-1)  # not bmm, by which a row's sum would hang on the number of rows
    return lam_B * mean_B - log_z_B


def normalised(tilted_BV):
    """(q (B, V), log Z (B,)) of log p + lam s, where Z = E_p exp(lam s), and KL(q || p) = lam E_q s - log Z.

    log Z is log p + lam s - log q of any token: here of the likeliest, whose q is not small.
    """
    q_BV = torch.softmax(tilted_BV, -1)
    return q_BV, tilted_BV.amax(-1) - q_BV.amax(-1).log()


def log_normaliser(log_p_BV):
    """The log of the sum of exp(log p) (B,): what two log-probabilities of one token differ by."""
    first_B1 = log_p_BV.argmax(-1, keepdim=True)
    normed_BV = torch.log_softmax(log_p_BV, -1)
    return (log_p_BV.gather(-1, first_B1) - normed_BV.gather(-1, first_B1)).squeeze(-1)


def top1_bound(log_p_BV, score_BV, lam_B):
    """The largest lam_t up to lam at which the most likely token of p is still that of q."""
    first_B1 = log_p_BV.argmax(-1, keepdim=True)
    rise_BV = (score_BV - score_BV.gather(-1, first_B1)).mul_(lam_B.sign()[:, None]).clamp_(min=LEAST_RISE)
    ties_BV = (log_p_BV.gather(-1, first_B1) - log_p_BV).div_(rise_BV).scatter_(-1, first_B1, torch.inf)
    bound_B = torch.minimum(lam_B.abs(), ties_BV.amin(-1) * (1 - MARGIN)) * lam_B.sign()
    # of two tokens that are nearly tied, rounding may still prefer the other
    is_kept_B = tilted(log_p_BV, score_BV, bound_B).argmax(-1) == first_B1.squeeze(-1)
    return torch.where(is_kept_B, bound_B, 0.0)


def kl_bound(log_p_BV, score_BV, lam_B, max_kl, may_ask):
    """The largest lam_t up to lam whose KL is at most max_kl, to TOLERANCE of it."""
    is_beyond_B = kl(log_p_BV, score_BV, lam_B) > max_kl
    if not may_ask:
        return torch.where(is_beyond_B, solve(log_p_BV, score_BV, lam_B, max_kl, may_ask), lam_B)
    rows = is_beyond_B.nonzero().squeeze(-1)
    if len(rows):
        found = solve(log_p_BV[rows], score_BV[rows], lam_B[rows], max_kl, may_ask)
        lam_B = lam_B.index_copy(0, rows, found)
    return lam_B


def solve(log_p_BV, score_BV, most_B, max_kl, may_ask):
    """lam_t (B,) with KL just below max_kl, of rows that exceed it at `most`."""
    aim, sign_B = AIM * max_kl, most_B.sign()
    # s counts from its value at the likeliest token: of numbers that cancel, small ones round less
    score_BV = score_BV - score_BV.gather(-1, log_p_BV.argmax(-1, keepdim=True))
    low_B, high_B = torch.zeros_like(most_B), most_B.abs()
    variance_B = moments(log_p_BV.exp(), score_BV)[1]
    size_B = torch.minimum((2 * aim / variance_B).sqrt(), high_B / 2)  # near 0, KL is lam^2 Var_p(s) / 2
    for _ in range(NUM_STEPS):
        lam_B = sign_B * size_B
        q_BV, log_z_B = normalised(tilted(log_p_BV, score_BV, lam_B))
        mean_B, variance_B = moments(q_BV, score_BV)
        kl_B = lam_B * mean_B - log_z_B
        is_met_B = (kl_B - aim).abs() <= TOLERANCE * max_kl
        low_B = torch.where((kl_B <= aim) | is_met_B, torch.maximum(low_B, size_B), low_B)
        high_B = torch.where(kl_B > aim, torch.minimum(high_B, size_B), high_B)
        if may_ask and bool((is_met_B | (high_B <= LEAST_SHARE * most_B.abs())).all()):
            break
        # the root of KL is nearly straight in lam: Newton's method on it takes fewer steps than on KL
        root_B = kl_B.clamp(min=0.0).sqrt()
        next_B = size_B - 2 * root_B * (root_B - aim**0.5) / (size_B * variance_B)
        is_inside_B = (next_B > low_B) & (next_B < high_B)
        size_B = torch.where(is_met_B, size_B, torch.where(is_inside_B, next_B, (low_B + high_B) / 2))
    return sign_B * low_B


def moments(q_BV, score_BV):
    """(E_q s, Var_q s), each (B,); q is overwritten. The variance only says where to look next: it is E s^2
    less the square of E s, which rounds, for two passes over the vocabulary less."""
    weighted_BV = q_BV.mul_(score_BV)
    mean_B = weighted_BV.sum(-1)
    return mean_B, (weighted_BV.mul_(score_BV).sum(-1) - mean_B.square()).clamp_(min=0.0)
