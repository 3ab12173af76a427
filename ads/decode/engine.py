"""Defended sampling of many rows at once: a teacher, a proxy for the score, and slots that never idle.

A step of all rows is `Decoder.advance`, in the order of the paper's Algorithm 1:

    1. the teacher reads each row's newest token        log p_T(x)
    2. so does the proxy                                 s(x): Delta by eq. 10, or its limit (eps = 0)
    3. a token is drawn                                  q(x) ~ exp(log p_T(x) / tau + lam_t s(x))     eq. 11
    4. it is recorded, and is its row's newest token

All else keeps the batch full. A row has a slot of the models' KV caches; when it ends, a waiting prompt takes
the slot over. A response may be followed by a forced answer: given ids, then greedy ones without Delta.

Shapes: B slots, N slots of a step (0..N-1), G rows admitted; V vocabulary (token ids of the tokenizer), R
logits of a model (R >= V); M positions of a slot.
"""

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch

from ads import cpu, sampling
from ads.decode import graph, memory_plan
from ads.decode.cached_model import CachedModel
from ads.decode.corruption import Corruption
from ads.decode.rows import Completion, Row
from ads.kv_cache import whole
from ads.loading import free_bytes
from ads.stage.errors import UserError
from ads.trials import is_out_of_memory

REFILL_SHARE = 8  # prompts wait until an eighth of the slots is free: together they prefill in less time
STATIC_POSITIONS = 128  # positions that static steps read are multiples of this


@dataclass(frozen=True)
class Models:
    """What decodes: the teacher; the proxy, or None; a bool mask of the ids that may be sampled; the ids that
    end a row; and what corrupts results, or None.

    The proxy is a delta/proxy.py: Proxy. It has a CachedModel's allocate, try_length, prefill, extend, step,
    release and bytes_per_position, but gives Delta or log-probabilities (rows, V) instead of logits.
    """

    teacher: CachedModel
    proxy: Any
    allowed_V: torch.Tensor
    eos: frozenset[int]
    corruption: Corruption | None = None

    @property
    def both(self):
        return [self.teacher, self.proxy] if self.proxy else [self.teacher]

    @property
    def shared_V(self):
        """Ids that mean the same to the proxy; None where all do."""
        shared_V = self.proxy and self.proxy.shared_V
        return None if shared_V is None or bool(shared_V.all()) else shared_V

    @property
    def num_models(self):
        return 1 + (len(self.proxy.models) if self.proxy else 0)

    def allocate(self, num_slots, num_positions):
        for model in self.both:
            model.allocate(num_slots, num_positions)

    def release(self, slot, last, length):
        for model in self.both:
            model.release(slot, last, length)


def choose_batch_size(models, requests, forcing=None, num_processes=1):
    """As many slots as the device's free memory holds, on a CPU shared by processes."""
    models.allocate(0, 0)  # the caches of what this process decoded before
    device = models.allowed_V.device
    free = free_bytes(device) / (num_processes if device.type == "cpu" else 1)
    position = sum(model.bytes_per_position for model in models.both)
    row = memory_plan.slot_bytes(num_positions(requests, forcing), position, len(models.allowed_V))
    return memory_plan.num_slots(free, row, device.type)


def num_positions(requests, forcing):
    """Tokens that the longest row may come to."""
    longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
    return longest + (forcing.max_ids + forcing.max_new_tokens if forcing else 0)


def generate(models, distribution, seed, requests, batch_size, forcing=None, cuda_graph=False):
    """Yield a Completion per request, in the order they end. Completions do not depend on batch_size.

    distribution: a sampling.Sampling. cuda_graph: steps are captured where they can be (see graph.py); on a
    CPU they are the same, uncaptured.

    Out of memory halves the batch, says so and goes on; with one row it is an error. So are logits or Delta
    that are not finite, naming problem and step (ValueError).
    """
    waiting = {request.id: request for request in requests}
    assert len(waiting) == len(requests), "request ids must differ"
    is_static = cuda_graph or models.allowed_V.device.type == "cuda"
    if cuda_graph and (reason := graph.obstacle(models)):
        print(f"cuda_graph: {reason}: steps run uncaptured", flush=True)
        cuda_graph = False
    size = num_positions(requests, forcing)
    while waiting:
        try:
            num_slots = min(batch_size, len(waiting))
            decoder = Decoder(models, distribution, seed, num_slots, size, forcing, is_static, cuda_graph)
            for completion in decoder.run(list(waiting.values())):
                del waiting[completion.id]
                yield completion
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise UserError(
                    "out of memory with batch_size=1: lower max_length or use 16-bit dtypes"
                ) from error
        if waiting:  # out of memory; freed here, where no traceback holds the tensors
            decoder = None
            models.allocate(0, 0)
            torch.cuda.empty_cache()
            batch_size = (batch_size + 1) // 2
            print(f"out of memory: going on with batch_size={batch_size}", flush=True)


class Decoder:
    """The slots of one batch: the state of each row on the device, beside the models' KV caches.

    Rows sit in slots 0..N-1. A slot whose row has ended is parked until another row takes it: it is computed
    with the others, its state does not move, and what it samples is dropped.

        is_static False   a step has just the slots that have rows, and the host sees each result before it
                          launches the next step
        is_static True    a step depends on tensors alone, so that a GPU can replay it as a captured graph: N
                          and the positions read take few values (the rest is parked or masked), forced rows
                          are always reckoned with, and the host sees a result only after it has launched the
                          next step. What that step sampled for a row that had ended is dropped.
    """

    def __init__(self, models, distribution, seed, num_slots, num_positions, forcing, is_static, is_captured):
        for model in models.both:
            model.try_length(num_positions)
        models.allocate(num_slots, num_positions)
        self.models, self.distribution, self.seed, self.forcing = models, distribution, seed, forcing
        self.num_slots, self.num_positions, self.is_static = num_slots, num_positions, is_static
        self.rows, self.pending, self.num_launched = [], deque(), 0  # rows: of each slot a Row, or None
        self.counts = static_counts(num_slots) if is_static else range(num_slots + 1)
        self.most_pending = int(is_static and models.corruption is None)  # the host corrupts at each step
        self.graphs = graph.Graphs() if is_captured else None
        self.device = models.allowed_V.device
        self.is_eos_V = torch.zeros_like(models.allowed_V)
        self.is_eos_V[sorted(models.eos)] = True
        # ids that a forced row is given, each at its place among the row's ids
        self.given_BM = torch.zeros(num_slots, num_positions, dtype=torch.int64, device=self.device)
        # newest token, random key, number of ids sampled, number of tokens cached, where a forced row's given
        # ids end (0: not forced), and how far a step moves the row on: 1, in a parked slot 0
        self.state_6B = torch.zeros(6, num_slots, dtype=torch.int64, device=self.device)

    @property
    def active(self):
        """The rows that are being decoded, by slot."""
        return [row for row in self.rows if row is not None]

    def advance(self, num_rows, length):
        """A step of slots 0..num_rows-1, which reads `length` positions of each: (record, logits, Delta).

        All of it is on the device; the record is that of `sample`.
        """
        active, state_6N, given_NM = self.active, self.state_6B[:, :num_rows], None
        newest_N, _, _, lengths_N, _, _ = state_6N
        logits_NR, proxy_NV = self.models.teacher.step(newest_N, lengths_N, length - 1), None
        if self.models.proxy and (self.is_static or not all(row.response for row in active)):
            proxy_NV = self.models.proxy.step(newest_N, lengths_N, length - 1)
        if self.forcing and (self.is_static or any(row.response for row in active)):
            given_NM = self.given_BM[:num_rows]
        return self.sample(logits_NR, proxy_NV, state_6N, self.rows, given_NM), logits_NR, proxy_NV

    def sample(self, logits_NR, proxy_NV, state_6N, rows, given_NM=None):
        """Draw a token for each row by eq. 11 and move the rows' state on to it.

        Returns the record, float32 (6, N): the token's id (which float32 holds up to 2^24), whether that ends
        a row, its log-probability under the teacher without a defence (NaN if one of the row's logits is NaN
        or +inf), KL(q || p), lam_t, and the sum of the row's scores. given_NM: ids of forced rows, None where
        no row is forced.
        """
        newest_N, keys_N, num_ids_N, _, num_given_N, pace_N = state_6N
        log_probs_NV = sampling.log_probs(logits_NR, self.models.allowed_V)
        given = log_probs_NV, proxy_NV, self.distribution, keys_N, num_ids_N
        tokens_N, adjusted = sampling.sample(*given)
        if self.models.corruption:
            tokens_N = self.models.corruption.corrupt(tokens_N, rows)
        if given_NM is not None:
            tokens_N = torch.where(num_given_N > 0, log_probs_NV.argmax(-1), tokens_N)
            given_N = given_NM.gather(1, num_ids_N[:, None]).squeeze(1)
            tokens_N = torch.where(num_ids_N < num_given_N, given_N, tokens_N)
        newest_N.copy_(tokens_N)
        state_6N[2:4].add_(pace_N)
        chosen_N = log_probs_NV.gather(1, tokens_N[:, None]).squeeze(1)
        zeros_N = torch.zeros_like(chosen_N)
        price = zeros_N, zeros_N, zeros_N
        if proxy_NV is not None:
            price = adjusted.kl_B, adjusted.lam_B, adjusted.score_BV.sum(-1)
        return torch.stack([tokens_N.float(), self.is_eos_V[tokens_N].float(), chosen_N, *price])

    @torch.inference_mode()
    def run(self, requests):
        """Yield a Completion per request. Longest prompts go first, so like lengths prefill together."""
        queue = deque(sorted(requests, key=lambda r: (-len(r.prompt_ids), r.id)))
        enough = max(1, self.num_slots // REFILL_SHARE)
        while queue or self.active:
            if self.active:
                yield from self.step()
            num_active = len(self.active)
            num_free = self.num_slots - num_active
            if queue and (num_free >= enough or not num_active):
                yield from self.admit([queue.popleft() for _ in range(min(num_free, len(queue)))])

    def admit(self, group):
        """Prefill prompts into free slots and sample their first token."""
        self.rows += [None] * (self.num_slots - len(self.rows))
        slots = [slot for slot, row in enumerate(self.rows) if row is None][: len(group)]
        prompts = [request.prompt_ids for request in group]
        logits_GR = self.models.teacher.prefill(prompts, slots)
        proxy_GV = self.models.proxy.prefill(prompts, slots) if self.models.proxy else None
        cpu.give_back_freed_memory()
        for request, slot in zip(group, slots, strict=True):
            key, length = sampling.row_key(self.seed, request.id), len(request.prompt_ids)
            self.rows[slot] = Row(request, request.max_new_tokens, key, slot, length, self.num_launched)
        rows = [self.rows[slot] for slot in slots]
        # one cached token too few: `sample` moves rows on, but here the newest has been read already
        state_6G = self.to_device([[0, row.key, 0, row.num_cached - 1, 0, 1] for row in rows]).T.contiguous()
        record_6G = self.sample(logits_GR, proxy_GV, state_6G, rows)
        self.state_6B[:, self.to_device(slots)] = state_6G
        yield from self.look_at(record_6G, rows)

    def step(self):
        """Launch a step of all rows, and yield the Completions of those whose end the host sees now."""
        self.close_ranks()
        active = self.active
        length = 1 + max(row.num_cached for row in active)
        if self.is_static:
            length = min(whole(length, STATIC_POSITIONS), self.num_positions)
        sizes = len(self.rows), length
        record_6N = self.graphs.step(self, *sizes) if self.graphs else self.advance(*sizes)[0]
        for row in active:
            row.num_cached += 1
        yield from self.look_at(record_6N, list(self.rows))

    def look_at(self, record_6N, rows):
        """Queue the record of a launch; take in what is due: it or, with static steps, the one before."""
        self.pending.append(Pending(self.num_launched, rows, record_6N))
        self.num_launched += 1
        while len(self.pending) > self.most_pending:
            yield from self.take_in(self.pending.popleft())

    def take_in(self, pending):
        """Add what was sampled to its rows; yield the Completions of those that end with it."""
        ended, bad = [], None
        for row, token, is_end, log_prob, kl, lam, score in zip(pending.rows, *pending.read(), strict=True):
            if row is None or pending.number < row.first_launch:
                continue
            row.take(token, log_prob, kl, lam, self.distribution.lam if self.models.proxy else 0.0)
            if math.isnan(log_prob) or not math.isfinite(score):
                bad = row, "teacher's logits" if math.isnan(log_prob) else "proxy's scores"
            elif (is_end and len(row.ids) > row.num_given) or len(row.ids) == row.limit:
                ended.append((row, bool(is_end)))
        for row, finished in reversed(ended):
            yield from self.end(row, finished)
        if bad:  # only now: what ended in the same step is kept
            row, numbers = bad
            raise UserError(
                f"problem {row.request.id}, response token {len(row.ids) - 1}: the {numbers} are not finite "
                "(NaN or infinite): check the weights, or use dtype=bfloat16 or float32"
            )

    def end(self, row, finished):
        """Yield the row's Completion, unless its response has only now ended and a forced part follows."""
        if row.response is None:
            price = (row.kl, row.lam, row.num_capped) if self.models.proxy else None
            row.response = Completion(row.request.id, list(row.ids), finished, row.log_prob, price)
            if self.forcing:
                self.force(row)
                return
        else:
            row.response = replace(row.response, forced_ids=row.ids[row.num_given :])
        self.park(row)
        yield row.response

    def force(self, row):
        """Give the row the ids that follow its response; those it samples after them are greedy.

        A static step may have been launched before the host saw the response's end, and has moved the row on.
        It goes back to that end: the step's result is dropped, what it cached is overwritten.
        """
        given = self.forcing.ids_of(row.request, row.response.ids)
        row.response = replace(row.response, given_ids=given)
        start = len(row.ids) - row.response.finished
        row.num_given, row.first_launch = start + len(given), self.num_launched
        row.limit = row.num_given + self.forcing.max_new_tokens
        row.num_cached = len(row.request.prompt_ids) + len(row.ids) - 1
        newest = given[0] if row.response.finished and given else row.ids[-1]
        state = [newest, row.key, len(row.ids), row.num_cached, row.num_given, 1]
        self.given_BM[row.slot, start : row.num_given] = self.to_device(given)
        self.state_6B[:, row.slot] = self.to_device(state)

    def park(self, row):
        """Take a row that has ended out of its slot."""
        self.models.release(row.slot, row.slot, 0)
        self.state_6B[:, row.slot] = 0
        self.rows[row.slot], row.first_launch = None, math.inf

    def close_ranks(self):
        """Where fewer slots would do, the last rows move into parked ones."""
        if None not in self.rows:
            return
        num_rows = min(n for n in self.counts if n >= len(self.active))
        parked = [slot for slot, row in enumerate(self.rows[:num_rows]) if row is None]
        for row in filter(None, self.rows[num_rows:]):
            slot = parked.pop(0)
            self.models.release(slot, row.slot, row.num_cached)
            self.state_6B[:, slot] = self.state_6B[:, row.slot]
            self.given_BM[slot] = self.given_BM[row.slot]
            self.state_6B[:, row.slot] = 0
            self.rows[slot], row.slot = row, slot
        del self.rows[num_rows:]

    def to_device(self, values):
        """An int64 tensor. From memory that is not pinned, the copy would wait for all that was launched."""
        values = torch.tensor(values, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        return values.to(self.device, non_blocking=True)


class Pending:
    """A record on its way to the host, of the rows it is of; number: how many launches came before."""

    def __init__(self, number, rows, record_6N):
        self.number, self.rows = number, rows
        self.record_6N = record_6N.to("cpu", non_blocking=True)  # from CUDA into pinned memory
        stream = torch.cuda.current_stream(record_6N.device) if record_6N.is_cuda else None
        self.copied = stream and stream.record_event()

    def read(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.record_6N.tolist()


def static_counts(num_slots):
    """The numbers of slots that static steps have."""
    return sorted({0, min(16, num_slots), -(-num_slots // 4), -(-num_slots // 2), num_slots})
