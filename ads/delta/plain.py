"""A proxy as it is, for defences that need its log-probabilities and no derivative."""

from ads import sampling
from ads.decode.cached_model import CachedModel
from ads.delta.proxy import Proxy


class PlainProxy(Proxy):
    """One proxy, which gives log p_P."""

    def __init__(self, model, shared_V):
        """shared_V: bool mask of the ids that mean the same to the teacher."""
        super().__init__(CachedModel(model))
        self.shared_V = shared_V

    def score(self, logits_BR):
        """log p_P over the shared ids, -inf elsewhere."""
        return sampling.log_probs(logits_BR, self.shared_V)
