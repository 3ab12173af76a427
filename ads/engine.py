"""Batched decoding of a teacher, with or without a proxy, over slots that are refilled as rows end.

Shapes: B slots, N active slots (always 0..N-1), V vocabulary (token ids of the tokenizer), M most new tokens
of a row.
"""

from collections import deque
from dataclasses import dataclass

import torch

from ads import sampling
from ads.models import CachedModel
from ads.proxy import CentralDifference, ExactDerivative

PREFILL_TOKENS = 16384  # prompts are prefilled in groups of at most this many tokens (padding included)
GOING_ON, ENDED, BAD_TEACHER, BAD_PROXY = range(4)


@dataclass(frozen=True)
class Request:
    """One row to decode. `id` seeds its random numbers."""

    id: str
    prompt_ids: list[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Completion:
    """What was sampled: ids (the ending eos included), whether an eos ended it, and the sum over ids of
    log p_T (nats) under the unadjusted teacher at temperature 1."""

    id: str
    ids: list[int]
    finished: bool
    log_prob: float


@dataclass(frozen=True)
class Models:
    """What decodes: a teacher (models.CachedModel), a proxy (of proxy.py) or None, the bool mask
    of ids that may be sampled, and the ids that end a row."""

    teacher: CachedModel
    proxy: CentralDifference | ExactDerivative | None
    allowed_V: torch.Tensor
    eos: frozenset[int]

    def allocate(self, num_slots, num_positions):
        self.teacher.allocate(num_slots, num_positions)
        if self.proxy:
            self.proxy.allocate(num_slots, num_positions)

    def move(self, source, target, length):
        self.teacher.move(source, target, length)
        if self.proxy:
            self.proxy.move(source, target, length)


def generate(models, rule, seed, requests, batch_size):
    """Yield a Completion per request, in the order they end. Completions do not depend on batch_size.

    Out of memory halves the batch, says so and goes on; with one row it is an error. Raises ValueError naming
    the problem and the step where logits or Delta are not finite.
    """
    waiting = {request.id: request for request in requests}
    assert len(waiting) == len(requests), "request ids must differ"
    num_positions = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
    while waiting:
        try:
            decoder = Decoder(models, rule, seed, min(batch_size, len(waiting)), num_positions)
            for completion in decoder.run(list(waiting.values())):
                del waiting[completion.id]
                yield completion
        except torch.OutOfMemoryError as error:
            if batch_size == 1:
                raise ValueError(
                    "out of memory with batch_size=1: lower max_length or use 16-bit dtypes"
                ) from error
        if waiting:  # out of memory; freed here, where no traceback holds the tensors
            models.allocate(0, 0)
            torch.cuda.empty_cache()
            batch_size = (batch_size + 1) // 2
            print(f"out of memory: going on with batch_size={batch_size}", flush=True)


class Decoder:
    """The slots of one batch: token buffers and lengths, with the models' KV caches beside them."""

    def __init__(self, models, rule, seed, num_slots, num_positions):
        models.allocate(num_slots, num_positions)
        self.models, self.rule, self.seed = models, rule, seed
        device = models.allowed_V.device
        self.is_eos_V = torch.zeros_like(models.allowed_V)
        self.is_eos_V[sorted(models.eos)] = True
        self.requests = []  # of the active slots, in order
        self.num_new = []  # tokens sampled so far, per active slot (steps_B, on the host)
        self.tokens_BM = torch.zeros(num_slots, num_positions, dtype=torch.int64, device=device)
        self.last_B, self.keys_B, self.steps_B, self.lengths_B = torch.zeros(
            4, num_slots, dtype=torch.int64, device=device
        )
        self.log_prob_B = torch.zeros(num_slots, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def run(self, requests):
        """Yield a Completion per request. Longest prompts go first, so like lengths prefill together."""
        queue = deque(sorted(requests, key=lambda r: (-len(r.prompt_ids), r.id)))
        while queue or self.requests:
            if self.requests:
                yield from self.step()
            while queue and len(self.requests) < len(self.lengths_B):
                yield from self.admit(queue)

    def admit(self, queue):
        """Prefill waiting prompts into free slots and sample their first token."""
        first = len(self.requests)
        group = [queue.popleft()]
        width = len(group[0].prompt_ids)
        while (
            queue and first + len(group) < len(self.lengths_B) and (len(group) + 1) * width <= PREFILL_TOKENS
        ):
            group.append(queue.popleft())
        prompts = [request.prompt_ids for request in group]
        logits_GR = self.models.teacher.prefill(prompts, first)
        delta_GV = self.models.proxy.prefill(prompts, first) if self.models.proxy else None
        slots = slice(first, first + len(group))
        keys = [sampling.row_key(self.seed, request.id) for request in group]
        self.keys_B[slots] = torch.tensor(keys, device=self.keys_B.device)
        self.lengths_B[slots] = torch.tensor([len(p) for p in prompts], device=self.keys_B.device)
        self.steps_B[slots] = 0
        self.log_prob_B[slots] = 0
        self.requests += group
        self.num_new += [0] * len(group)
        yield from self.append(logits_GR, delta_GV, slots)

    def step(self):
        """Run every active slot's last token through the models and sample the next."""
        active = slice(0, len(self.requests))
        longest = max(len(r.prompt_ids) + n - 1 for r, n in zip(self.requests, self.num_new, strict=True))
        last_N, lengths_N = self.last_B[active], self.lengths_B[active]
        logits_NR = self.models.teacher.step(last_N, lengths_N, longest)
        delta_NV = self.models.proxy.step(last_N, lengths_N, longest) if self.models.proxy else None
        self.lengths_B[active] += 1
        yield from self.append(logits_NR, delta_NV, active)

    def append(self, logits_NR, delta_NV, slots):
        """Sample one token for each slot of a slice, record it, and yield the rows that ended."""
        log_probs_NV = sampling.log_probs(logits_NR, self.models.allowed_V)
        tokens_N = sampling.sample(log_probs_NV, delta_NV, self.rule, self.keys_B[slots], self.steps_B[slots])
        index_N1 = tokens_N[:, None]
        self.tokens_BM[slots].scatter_(1, self.steps_B[slots][:, None], index_N1)
        self.log_prob_B[slots] += log_probs_NV.gather(1, index_N1).squeeze(1).double()
        self.last_B[slots] = tokens_N
        self.steps_B[slots] += 1
        states = row_states(log_probs_NV, delta_NV, self.is_eos_V[tokens_N]).tolist()
        for slot in range(slots.start, slots.start + len(states)):
            self.num_new[slot] += 1
        for slot, state in reversed(list(enumerate(states, slots.start))):
            if state in (BAD_TEACHER, BAD_PROXY):
                raise_not_finite(self.requests[slot].id, self.num_new[slot] - 1, state)
            if state == ENDED or self.num_new[slot] == self.requests[slot].max_new_tokens:
                yield self.release(slot, finished=state == ENDED)

    def release(self, slot, finished):
        """Take a row out; the last active slot moves into its place."""
        ids = self.tokens_BM[slot, : self.num_new[slot]].tolist()
        completion = Completion(self.requests[slot].id, ids, finished, self.log_prob_B[slot].item())
        last = len(self.requests) - 1
        if slot != last:
            # the newest token is not in the cache yet
            length = len(self.requests[last].prompt_ids) + self.num_new[last] - 1
            self.models.move(last, slot, length)
            for tensor in (
                self.tokens_BM,
                self.last_B,
                self.keys_B,
                self.steps_B,
                self.lengths_B,
                self.log_prob_B,
            ):
                tensor[slot] = tensor[last]
            self.requests[slot], self.num_new[slot] = self.requests[last], self.num_new[last]
        self.requests.pop()
        self.num_new.pop()
        return completion


def replay(models, rule, seed, requests, responses, num_slots):
    """What the rule thought of given responses: per request a list of (clean, adjusted, Delta) per token.

    clean and adjusted are the token's probabilities under softmax(log p_T / tau) and under eq. 11, both
    before truncation; Delta is in nats per unit of g.
    """
    judged = []
    for first in range(0, len(requests), num_slots):
        group = slice(first, first + num_slots)
        judged += replay_group(models, rule, seed, requests[group], responses[group])
    return judged


@torch.inference_mode()
def replay_group(models, rule, seed, requests, responses):
    prompts, most = [request.prompt_ids for request in requests], max(map(len, responses))
    longest = max(map(len, prompts))
    models.allocate(len(prompts), longest + most)
    device = models.allowed_V.device
    # rows that end early go on with token 0, to no effect on the others
    tokens_BM = torch.tensor([r + [0] * (most - len(r)) for r in responses], device=device)
    keys_B = torch.tensor([sampling.row_key(seed, request.id) for request in requests], device=device)
    lengths_B = torch.tensor([len(p) for p in prompts], device=device)
    logits_BR, delta_BV = models.teacher.prefill(prompts, 0), models.proxy.prefill(prompts, 0)
    judged = []
    for step in range(most):
        if step:
            last = tokens_BM[:, step - 1], lengths_B + step - 1, longest + step - 1
            logits_BR, delta_BV = models.teacher.step(*last), models.proxy.step(*last)
        judged.append(judge(models, rule, logits_BR, delta_BV, tokens_BM[:, step], keys_B, step))
    judged_BM3 = torch.stack(judged, dim=1).tolist()
    return [row[: len(r)] for row, r in zip(judged_BM3, responses, strict=True)]


def judge(models, rule, logits_BR, delta_BV, tokens_B, keys_B, step):
    """(clean probability, adjusted probability, Delta) of one given token per row, (B, 3)."""
    log_probs_BV = sampling.log_probs(logits_BR, models.allowed_V)
    if rule.is_permuted:
        delta_BV = sampling.permute(delta_BV, keys_B, torch.full_like(keys_B, step))
    clean_BV = sampling.scores(log_probs_BV, None, rule).softmax(-1)
    adjusted_BV = sampling.scores(log_probs_BV, delta_BV, rule).softmax(-1)
    index_B1 = tokens_B[:, None]
    return torch.cat([values.gather(1, index_B1) for values in (clean_BV, adjusted_BV, delta_BV)], dim=1)


def row_states(log_probs_NV, delta_NV, is_eos_N):
    """What the host must know of each row, (N,): GOING_ON, ENDED, BAD_TEACHER or BAD_PROXY.

    NaN or +inf among the logits makes every log-probability of the row NaN.
    """
    states_N = is_eos_N.long() * ENDED
    if delta_NV is not None:
        states_N = states_N.masked_fill(~delta_NV.sum(-1).isfinite(), BAD_PROXY)
    return states_N.masked_fill(log_probs_NV.amax(-1).isnan(), BAD_TEACHER)


def raise_not_finite(problem_id, step, state):
    model = "teacher's logits" if state == BAD_TEACHER else "proxy's Delta"
    raise ValueError(
        f"problem {problem_id}, response token {step}: the {model} are not finite (NaN or infinite): "
        "check the weights, or use dtype=bfloat16 or float32"
    )
