"""A proxy as it is, for defences that need its log-probabilities and no derivative (see defences/scores.py).

Shapes: B rows, V vocabulary (the teacher's token ids).
"""

from ads import sampling
from ads.decode.cached_model import CachedModel


class PlainProxy:
    """One proxy in lockstep with the teacher's slots: log p_P, -inf at ids that are not shared."""

    def __init__(self, model, shared_V):
        self.proxy = CachedModel(model)
        self.models, self.shared_V = (self.proxy,), shared_V
        self.bytes_per_position = self.proxy.bytes_per_position

    def allocate(self, num_slots, num_positions):
        self.proxy.allocate(num_slots, num_positions)

    def try_length(self, num_positions):
        self.proxy.try_length(num_positions)

    def prefill(self, prompts, slots):
        """log p_P (B, V) of the token that follows each prompt; see CachedModel.prefill."""
        return sampling.log_probs(self.proxy.prefill(prompts, slots), self.shared_V)

    def extend(self, ids, length):
        """log p_P (T, V) after each of the tokens appended to slot 0; see CachedModel.extend."""
        return sampling.log_probs(self.proxy.extend(ids, length), self.shared_V)

    def step(self, tokens_N, lengths_N, longest):
        """log p_P (N, V) of the token that follows; see CachedModel.step."""
        return sampling.log_probs(self.proxy.step(tokens_N, lengths_N, longest), self.shared_V)

    def release(self, slot, last, length):
        self.proxy.release(slot, last, length)
