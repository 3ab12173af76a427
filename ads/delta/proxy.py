"""What is decoded beside the teacher: proxies in lockstep with its slots, and what they say of each token.

Shapes: B rows, N active slots, T tokens given, V vocabulary (the teacher's token ids), R >= V logits of a
model.
"""

import torch

from ads.decode.cached_model import each_slot


class Proxy:
    """The engine's interface to any kind of proxy: that of a CachedModel, with scores where that has logits.

    A kind is a constructor, which hands over CachedModels of one architecture, and a score.
    """

    def __init__(self, *models):
        self.models = models
        self.bytes_per_position = sum(model.bytes_per_position for model in models)

    def score(self, *logits_BR):
        """float32 (B, V), of the logits of each model: such as Delta, in nats per unit of g."""
        raise NotImplementedError

    def allocate(self, num_slots: int, num_positions: int):
        """Replace the caches by empty ones."""
        for model in self.models:
            model.allocate(num_slots, num_positions)

    def try_length(self, num_positions: int):
        """ValueError where rows of so many tokens would be decoded wrong."""
        self.models[0].try_length(num_positions)

    def prefill(self, prompts: list[list[int]], slots: list[int] | int):
        """Fill slots with prompts; scores (B, V) of the token that follows each. See CachedModel.prefill."""
        slots, scores = each_slot(prompts, slots), []
        for group in self.models[0].groups(prompts):
            given = prompts[group], slots[group]
            scores.append(self.score(*(model.prefill_group(*given) for model in self.models)))
        return torch.cat(scores)

    def extend(self, ids: list[int], length: int):
        """Scores (T, V) after each of the tokens appended to slot 0; see CachedModel.extend."""
        return self.score(*(model.extend(ids, length) for model in self.models))

    def step(self, tokens_N, lengths_N, longest: int):
        """Append a token to each slot; scores (N, V) of the one that follows. See CachedModel.step."""
        return self.score(*(model.step(tokens_N, lengths_N, longest) for model in self.models))

    def release(self, slot: int, last: int, length: int):
        """A slot's row has ended: the last one, of `length` tokens, takes its place."""
        for model in self.models:
            model.release(slot, last, length)
