"""Batched decoding of a teacher, with or without a proxy, over slots that are refilled as rows end.

Shapes: B slots, N active slots (always 0..N-1), V vocabulary (token ids of the tokenizer), M most new tokens
of a row, T tokens of a row.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ads import memory, sampling
from ads.corruption import Corruption
from ads.models import CachedModel, free_bytes, give_back_freed_memory, is_out_of_memory
from ads.proxy import CentralDifference, ExactDerivative

REFILL_SHARE = 8  # prompts wait until an eighth of the slots is free: together they prefill in less time
REPLAYED_TOKENS = 256  # at once: their logits over the vocabulary are held some ten times
GOING_ON, ENDED, BAD_TEACHER, BAD_PROXY = range(4)


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
    log p_T (nats) under the unadjusted teacher at temperature 1; with Forcing, the greedy ids after it."""

    id: str
    ids: list[int]
    finished: bool
    log_prob: float
    forced_ids: list[int] | None = None


@dataclass
class Row:
    """What the host knows of an active slot: num_new ids are in its buffer, of which there may be `limit`.

    response: the Completion so far, once the row is in its forced part; num_given: where that was given to.
    """

    request: Request
    limit: int
    num_new: int = 0
    response: Completion | None = None
    num_given: int = 0

    @property
    def num_cached(self):
        """Positions in the KV caches: the newest token is not there yet."""
        return len(self.request.prompt_ids) + self.num_new - 1


@dataclass(frozen=True)
class Models:
    """What decodes: a teacher (models.CachedModel), a proxy (of proxy.py) or None, the bool mask
    of ids that may be sampled, the ids that end a row, and what corrupts results, or None."""

    teacher: CachedModel
    proxy: CentralDifference | ExactDerivative | None
    allowed_V: torch.Tensor
    eos: frozenset[int]
    corruption: Corruption | None = None

    def allocate(self, num_slots, num_positions):
        self.teacher.allocate(num_slots, num_positions)
        if self.proxy:
            self.proxy.allocate(num_slots, num_positions)

    def try_length(self, num_positions):
        self.teacher.try_length(num_positions)
        if self.proxy:
            self.proxy.try_length(num_positions)

    def release(self, slot, last, length):
        self.teacher.release(slot, last, length)
        if self.proxy:
            self.proxy.release(slot, last, length)


def choose_batch_size(models, requests, forcing=None, num_processes=1):
    """As many slots as the device's free memory holds, on a CPU shared by processes."""
    models.allocate(0, 0)  # the caches of what this process decoded before
    device = models.allowed_V.device
    free = free_bytes(device) / (num_processes if device.type == "cpu" else 1)
    position = sum(m.bytes_per_position for m in (models.teacher, models.proxy) if m)
    row = memory.slot_bytes(num_positions(requests, forcing), position, len(models.allowed_V))
    return memory.num_slots(free, row, device.type)


def generate(models, rule, seed, requests, batch_size, forcing=None):
    """Yield a Completion per request, in the order they end. Completions do not depend on batch_size.

    Out of memory halves the batch, says so and goes on; with one row it is an error. Raises ValueError naming
    the problem and the step where logits or Delta are not finite.
    """
    waiting = {request.id: request for request in requests}
    assert len(waiting) == len(requests), "request ids must differ"
    while waiting:
        try:
            num_slots = min(batch_size, len(waiting))
            decoder = Decoder(models, rule, seed, num_slots, num_positions(requests, forcing), forcing)
            for completion in decoder.run(list(waiting.values())):
                del waiting[completion.id]
                yield completion
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise ValueError(
                    "out of memory with batch_size=1: lower max_length or use 16-bit dtypes"
                ) from error
        if waiting:  # out of memory; freed here, where no traceback holds the tensors
            models.allocate(0, 0)
            torch.cuda.empty_cache()
            batch_size = (batch_size + 1) // 2
            print(f"out of memory: going on with batch_size={batch_size}", flush=True)


def num_positions(requests, forcing):
    """Tokens that the longest row may come to."""
    longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
    return longest + (forcing.max_ids + forcing.max_new_tokens if forcing else 0)


class Decoder:
    """The slots of one batch: token buffers and lengths, with the models' KV caches beside them."""

    def __init__(self, models, rule, seed, num_slots, num_positions, forcing=None):
        models.try_length(num_positions)
        models.allocate(num_slots, num_positions)
        self.models, self.rule, self.seed, self.forcing = models, rule, seed, forcing
        device = models.allowed_V.device
        self.is_eos_V = torch.zeros_like(models.allowed_V)
        self.is_eos_V[sorted(models.eos)] = True
        self.num_slots, self.rows = num_slots, []  # Rows of the active slots, in order
        self.tokens_BM = torch.zeros(num_slots, num_positions, dtype=torch.int64, device=device)
        # newest token, random key, tokens in the buffer, tokens in the caches, tokens given of the buffer
        self.state_5B = torch.zeros(5, num_slots, dtype=torch.int64, device=device)
        self.last_B, self.keys_B, self.steps_B, self.lengths_B, self.given_B = self.state_5B
        self.log_prob_B = torch.zeros(num_slots, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def run(self, requests):
        """Yield a Completion per request. Longest prompts go first, so like lengths prefill together."""
        queue = deque(sorted(requests, key=lambda r: (-len(r.prompt_ids), r.id)))
        enough = max(1, self.num_slots // REFILL_SHARE)
        while queue or self.rows:
            if self.rows:
                yield from self.step()
            num_free = self.num_slots - len(self.rows)
            if queue and (num_free >= enough or not self.rows):
                yield from self.admit([queue.popleft() for _ in range(min(num_free, len(queue)))])

    def admit(self, group):
        """Prefill prompts into free slots and sample their first token."""
        first = len(self.rows)
        prompts = [request.prompt_ids for request in group]
        logits_GR = self.models.teacher.prefill(prompts, first)
        delta_GV = self.models.proxy.prefill(prompts, first) if self.models.proxy else None
        give_back_freed_memory()
        slots = slice(first, first + len(group))
        keys = [sampling.row_key(self.seed, request.id) for request in group]
        self.state_5B[:, slots] = 0
        self.keys_B[slots] = torch.tensor(keys, device=self.keys_B.device)
        self.lengths_B[slots] = torch.tensor([len(p) for p in prompts], device=self.keys_B.device)
        self.log_prob_B[slots] = 0
        self.rows += [Row(request, request.max_new_tokens) for request in group]
        yield from self.append(logits_GR, delta_GV, slots)

    def step(self):
        """Run every active slot's last token through the models and sample the next."""
        active = slice(0, len(self.rows))
        longest = max(row.num_cached for row in self.rows)
        last_N, lengths_N = self.last_B[active], self.lengths_B[active]
        logits_NR = self.models.teacher.step(last_N, lengths_N, longest)
        needs_delta = self.models.proxy and not all(row.response for row in self.rows)
        delta_NV = self.models.proxy.step(last_N, lengths_N, longest) if needs_delta else None
        self.lengths_B[active] += 1
        yield from self.append(logits_NR, delta_NV, active)

    def append(self, logits_NR, delta_NV, slots):
        """Sample one token for each slot of a slice, record it, and yield the rows that ended."""
        log_probs_NV = sampling.log_probs(logits_NR, self.models.allowed_V)
        steps_N, given_N = self.steps_B[slots], self.given_B[slots]
        tokens_N = sampling.sample(log_probs_NV, delta_NV, self.rule, self.keys_B[slots], steps_N)
        if self.models.corruption:
            tokens_N = self.corrupt(tokens_N, slots)
        is_end_N = self.is_eos_V[tokens_N]
        if any(row.response for row in self.rows[slots]):
            tokens_N = torch.where(given_N > 0, log_probs_NV.argmax(-1), tokens_N)
            written_N = self.tokens_BM[slots].gather(1, steps_N[:, None]).squeeze(1)
            tokens_N = torch.where(steps_N < given_N, written_N, tokens_N)
            is_end_N = self.is_eos_V[tokens_N] & (steps_N >= given_N)
        index_N1 = tokens_N[:, None]
        self.tokens_BM[slots].scatter_(1, steps_N[:, None], index_N1)
        self.log_prob_B[slots] += log_probs_NV.gather(1, index_N1).squeeze(1).double()
        self.last_B[slots] = tokens_N
        self.steps_B[slots] += 1
        for row in self.rows[slots]:
            row.num_new += 1
        states = list(enumerate(row_states(log_probs_NV, delta_NV, is_end_N).tolist(), slots.start))
        bad = [(self.rows[slot], state) for slot, state in states if state in (BAD_TEACHER, BAD_PROXY)]
        for slot, state in reversed(states):
            if state == ENDED or (state == GOING_ON and self.rows[slot].num_new == self.rows[slot].limit):
                yield from self.end(slot, finished=state == ENDED)
        if bad:  # only now: what ended in the same step is kept
            row, state = bad[-1]
            raise_not_finite(row.request.id, row.num_new - 1, state)

    def corrupt(self, tokens_N, slots):
        """The sampled tokens with those of results replaced, where they are to be."""
        tokens, keys_N = tokens_N.tolist(), self.keys_B[slots].cpu()
        for k, row in enumerate(self.rows[slots]):
            if tokens[k] in self.models.corruption.shapes and not row.response:
                slot = slots.start + k
                ids = self.tokens_BM[slot, : row.num_new].tolist() + [tokens[k]]
                tokens[k] = self.models.corruption.replace(ids, keys_N[k])
        return tokens_N.new_tensor(tokens)

    def end(self, slot, finished):
        """Yield the slot's Completion, unless its response has only now ended and a forced part follows."""
        row = self.rows[slot]
        ids = self.tokens_BM[slot, : row.num_new].tolist()
        if row.response is None:
            row.response = Completion(row.request.id, ids, finished, self.log_prob_B[slot].item())
            if self.forcing:
                self.force(slot, row)
                return
        else:
            row.response = replace(row.response, forced_ids=ids[row.num_given :])
        self.release(slot)
        yield row.response

    def force(self, slot, row):
        """Give the row the ids that follow its response; those it samples after them are greedy."""
        given = torch.tensor(self.forcing.ids_of(row.request, row.response.ids), device=self.tokens_BM.device)
        start = row.num_new - row.response.finished
        row.num_given = start + len(given)
        row.limit = row.num_given + self.forcing.max_new_tokens
        self.tokens_BM[slot, start : row.num_given] = given
        self.given_B[slot] = row.num_given
        self.last_B[slot] = self.tokens_BM[slot, row.num_new - 1]

    def release(self, slot):
        """Take a row out; the last active slot moves into its place."""
        last = len(self.rows) - 1
        self.models.release(slot, last, self.rows[last].num_cached)
        if slot != last:
            self.state_5B[:, slot] = self.state_5B[:, last]
            self.tokens_BM[slot], self.log_prob_B[slot] = self.tokens_BM[last], self.log_prob_B[last]
            self.rows[slot] = self.rows[last]
        self.rows.pop()


@torch.inference_mode()
def replay(models, rule, seed, request, response):
    """What the rule thought of a given response: a list of (clean, adjusted, Delta) per token.

    clean and adjusted are the token's probabilities under softmax(log p_T / tau) and under eq. 11, both
    before truncation; Delta is in nats per unit of g. The response is read like a prompt, in chunks.
    """
    num_prompt_tokens, given = len(request.prompt_ids), response[:-1]
    models.allocate(1, num_prompt_tokens + len(given))
    logits_1R, delta_1V = (m.prefill([request.prompt_ids], 0) for m in (models.teacher, models.proxy))
    judged = [judge(models, rule, seed, request, response[:1], 0, logits_1R, delta_1V)]
    for first in range(0, len(given), REPLAYED_TOKENS):
        ids, length = given[first : first + REPLAYED_TOKENS], num_prompt_tokens + first
        logits_TR, delta_TV = (m.extend(ids, length) for m in (models.teacher, models.proxy))
        judged_ids = response[first + 1 : first + 1 + len(ids)]
        judged.append(judge(models, rule, seed, request, judged_ids, first + 1, logits_TR, delta_TV))
    return torch.cat(judged).tolist()


def judge(models, rule, seed, request, ids, first, logits_TR, delta_TV):
    """(clean probability, adjusted probability, Delta) of each of a row's tokens `first`, ..., (T, 3)."""
    log_probs_TV = sampling.log_probs(logits_TR, models.allowed_V)
    tokens_T = torch.tensor(ids, device=log_probs_TV.device)
    if rule.is_permuted:
        keys_T = torch.full_like(tokens_T, sampling.row_key(seed, request.id))
        delta_TV = sampling.permute(delta_TV, keys_T, first + torch.arange(len(ids), device=keys_T.device))
    clean_TV = sampling.scores(log_probs_TV, None, rule).softmax(-1)
    adjusted_TV = sampling.scores(log_probs_TV, delta_TV, rule).softmax(-1)
    index_T1 = tokens_T[:, None]
    return torch.cat([values.gather(1, index_T1) for values in (clean_TV, adjusted_TV, delta_TV)], dim=1)


def row_states(log_probs_NV, delta_NV, is_eos_N):
    """What the host must know of each row, (N,):     GOING_ON, ENDED, BAD_TEACHER or BAD_PROXY.

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
