"""What goes into the engine and comes out of it, and what it knows of a row in between."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """One row to decode. `id` seeds its random numbers."""

    id: str
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Forcing:
    """What follows each response in its slot: given ids, then greedy ones without Delta.

    ids_of(request, response ids) gives at most max_ids ids, which take the place of an eos that ended the
    response.
    """

    ids_of: Callable[[Request, list[int]], list[int]]
    max_ids: int
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was sampled: ids (the ending eos included), whether an eos ended it, and the sum over ids of
    log p_T (nats) under the teacher without a defence at temperature 1; with a defence its price, the sums
    over ids of KL(q || p) (nats), of lam_t and of where lam_t is below lam; with Forcing, the ids given
    after it and the greedy ones after those."""

    id: str
    ids: list[int]
    finished: bool
    log_prob: float
    price: tuple[float, float, int] | None = None
    given_ids: list[int] | None = None
    forced_ids: list[int] | None = None


@dataclass(eq=False)
class Row:
    """What the host knows of the row in a slot: its ids after the prompt, of which there may be `limit`.

    num_cached: tokens in the KV caches once all launched steps are done; the newest one is not there yet.
    first_launch: results of earlier launches are not this row's, or no longer wanted (see Decoder.force).
    response: the Completion so far, once the forced part has begun; its given ids end before ids[num_given].
    """

    request: Request
    limit: int
    key: int
    slot: int
    num_cached: int
    first_launch: float
    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    kl: float = 0.0
    lam: float = 0.0
    num_capped: int = 0
    response: Completion | None = None
    num_given: int = 0

    def take(self, token, log_prob, kl, lam_t, lam):
        """Add an id with its log-probability and price."""
        self.ids.append(int(token))
        self.log_prob, self.kl, self.lam = self.log_prob + log_prob, self.kl + kl, self.lam + lam_t
        self.num_capped += abs(lam_t) < (1 - 1e-6) * abs(lam)
