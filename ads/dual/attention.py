"""Attention in dual numbers."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ads.dual.rules import Dual, halves, not_covered

ATTENTION = "dual"
# what some architectures add to the scores, which dual_attention does not
NOT_COVERED = ("s_aux", "sinks", "position_bias", "block_indices", "indices")


def dual_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, dropout=0.0, **others
):
    """softmax(softcap(scaling q k^T) + mask) v of a Dual of queries, (B, H, T, D) by its values.

    Keys and values are Duals, (B, K, L, D) by their values, or pairs of (B K, L, D). Returns a Dual,
    (B, T, H, D) by its values, and None. The mask (2B, 1, T, L) is added to the scores; softmax is float32.
    """
    check_covered(attention_mask, others)
    with torch._C.DisableTorchFunctionSubclass():
        pairs = [
            x if isinstance(x, tuple) else tuple(h.flatten(0, 1) for h in halves(x)) for x in (key, value)
        ]
        output = attend(query, *pairs[0], *pairs[1], attention_mask, scaling, softcap)
        return output.as_subclass(Dual), None


def attend(query, k, dk, v, dv, mask, scaling, softcap):
    """dual_attention of plain tensors: query (2B, H, T, D), k, dk, v and dv (B K, L, D)."""
    num_rows, num_heads, num_tokens, width = len(query) // 2, *query.shape[1:]
    num_keys, num_groups = len(k) // num_rows, num_heads * num_rows // len(k)
    size, shape = num_groups * num_tokens, (num_rows, num_keys, 2, num_groups, num_tokens)
    # the heads that share keys are rows of one product, above those of their derivatives
    queries = query.new_empty(*shape, width)
    grouped = query.unflatten(1, (num_keys, num_groups)).unflatten(0, (2, -1)).permute(1, 2, 0, 3, 4, 5)
    queries = torch.mul(grouped, scaling or width**-0.5, out=queries).view(len(k), 2 * size, width)
    scores, d_scores = torch.bmm(queries, k.mT).float().split(size, dim=1)
    d_scores = torch.bmm(queries[:, :size], dk.mT).float().add_(d_scores)  # baddbmm_ into a slice is slow
    if softcap is not None:
        capped = torch.tanh(scores / softcap)
        scores, d_scores = softcap * capped, d_scores * (1 - capped**2)
    masked = scores.reshape(num_rows, num_keys, num_groups, num_tokens, -1) + mask[:num_rows, :, None]
    parts = weigh(masked.view(d_scores.shape), d_scores, v, dv)
    output = torch.stack(parts).view(2, num_rows, num_keys, num_groups, num_tokens, width)
    return output.permute(0, 1, 4, 2, 3, 5).reshape(2 * num_rows, num_tokens, num_heads, width)


def weigh(scores, d_scores, v, dv):
    """softmax(scores) v and its derivative, (P, S, D) each, of float32 scores (P, S, L) and v (P, L, D).

    d(P v) = P dv + (P dS) v - sum(P dS) P v, for probabilities P of scores S.
    """
    size = scores.shape[1]
    both = scores.new_empty(len(scores), 2 * size, scores.shape[2])
    probs, changes = both.split(size, dim=1)
    torch.softmax(scores, -1, out=probs)
    torch.mul(probs, d_scores, out=changes)
    sums, both = changes.sum(-1, keepdim=True), both.to(v.dtype)
    value, change = torch.bmm(both, v).split(size, dim=1)
    change = torch.bmm(both[:, :size], dv).add_(change)
    return value, change.addcmul_(value, sums, value=-1)


def check_covered(attention_mask, others):
    unknown = [name for name in NOT_COVERED if others.get(name) is not None]
    if unknown:
        raise not_covered(f"attends with {', '.join(unknown)}, which attn_implementation=eager may cover")
    assert attention_mask is not None, "a mask is always made: see eager_mask"


AttentionInterface.register(ATTENTION, dual_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
