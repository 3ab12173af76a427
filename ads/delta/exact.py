"""The exact Delta: the derivative of a proxy's log-probabilities along g, by dual numbers."""

import torch

from ads.decode.cached_model import CachedModel, each_slot
from ads.delta.central import check_length
from ads.dual.factors import square_norm
from ads.dual.model import make_checked
from ads.dual.rules import halves


def log_probs_change(probs_BV, tangents_BV):
    """The derivative of log-probabilities (B, V), of probabilities and the derivatives of their logits.

    d log p(x) = dz(x) - sum over y of p(y) dz(y), for logits z.
    """
    change_BV = tangents_BV - torch.linalg.vecdot(probs_BV, tangents_BV)[:, None]
    # what all logits share is large and rounds; now the rest of it goes
    return change_BV.sub_(torch.linalg.vecdot(probs_BV, change_BV)[:, None])


class ExactDerivative:
    """One proxy in dual numbers, in lockstep with the teacher's slots: the limit of eps to 0."""

    def __init__(self, model, read_gradient, shared_V):
        """model is taken over; read_gradient(name) is g of a parameter, a tensor or Factors.

        Raises ValueError when the gradient is zero or not finite, or the derivative is not covered.
        """
        CachedModel(model, may_fuse=False)  # what cannot be decoded is no matter of the derivative
        names = [name for name, _ in model.named_parameters()]
        check_length(sum(square_norm(read_gradient(name)) for name in names))
        model = make_checked(model, read_gradient)
        self.dual = CachedModel(model)
        self.models = (self.dual,)
        self.bytes_per_position = self.dual.bytes_per_position
        self.shared_V, self.are_all_shared = shared_V, bool(shared_V.all())

    def allocate(self, num_slots, num_positions):
        self.dual.allocate(num_slots, num_positions)

    def try_length(self, num_positions):
        self.dual.try_length(num_positions)

    def prefill(self, prompts, slots):
        """Delta (B, V) for the token that follows each prompt; see CachedModel.prefill."""
        groups, slots = self.dual.groups(prompts), each_slot(prompts, slots)
        logits = (self.dual.prefill_group(prompts[g], slots[g]) for g in groups)
        return torch.cat([self.delta(logits_BR) for logits_BR in logits])

    def extend(self, ids, length):
        """Delta (T, V) after each of the tokens appended to slot 0; see CachedModel.extend."""
        return self.delta(self.dual.extend(ids, length))

    def step(self, tokens_N, lengths_N, longest):
        """Delta (N, V) for the token that follows; see CachedModel.step."""
        return self.delta(self.dual.step(tokens_N, lengths_N, longest))

    def release(self, slot, last, length):
        self.dual.release(slot, last, length)

    def delta(self, logits_BR):
        """Derivative of log-probabilities over the shared ids (nats per unit of g), of a dual.Dual; 0
        elsewhere (B, V)."""
        both = logits_BR.as_subclass(torch.Tensor)[:, : len(self.shared_V)].float()
        logits_BV, tangents_BV = halves(both)
        if self.are_all_shared:
            return log_probs_change(torch.softmax(logits_BV, -1), tangents_BV)
        probs_BV = torch.softmax(logits_BV.masked_fill(~self.shared_V, -torch.inf), -1)
        return log_probs_change(probs_BV, tangents_BV).masked_fill_(~self.shared_V, 0.0)
