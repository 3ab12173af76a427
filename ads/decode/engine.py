"""Batched decoding of a teacher, with or without a proxy, over slots that are refilled as rows end.

Shapes: B slots, N active slots (always 0..N-1), V vocabulary (token ids of the tokenizer), M most new tokens
of a row, T tokens of a row.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ads import cpu, sampling
from ads.decode import graph, memory_plan
from ads.decode.cached_model import CachedModel
from ads.decode.corruption import Corruption
from ads.delta.central import CentralDifference
from ads.delta.exact import ExactDerivative
from ads.kv_cache import whole
from ads.loading import free_bytes
from ads.stage.errors import UserError
from ads.trials import is_out_of_memory

REFILL_SHARE = 8  # prompts wait until an eighth of the slots is free: together they prefill in less time
STATIC_POSITIONS = 128  # positions that static steps read are multiples of this


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
    log p_T (nats) under the unadjusted teacher at temperature 1; with Forcing, the ids given after it and the
    greedy ones after those."""

    id: str
    ids: list[int]
    finished: bool
    log_prob: float
    given_ids: list[int] | None = None
    forced_ids: list[int] | None = None


@dataclass(eq=False)
class Row:
    """What the host knows of a row that is being decoded: of its ids there may be `limit`.

    num_cached: positions in the KV caches once all that was launched is done; the newest token is not there
    yet. since: what was launched before that number is none of its business. response: the Completion so far,
    once the row is in its forced part; num_given: where that was given to.
    """

    request: Request
    limit: int
    key: int
    slot: int
    num_cached: int
    since: float
    ids: list[int] = field(default_factory=list)
    log_prob: float = 0.0
    response: Completion | None = None
    num_given: int = 0


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
    row = memory_plan.slot_bytes(num_positions(requests, forcing), position, len(models.allowed_V))
    return memory_plan.num_slots(free, row, device.type)


def generate(models, rule, seed, requests, batch_size, forcing=None, cuda_graph=False):
    """Yield a Completion per request, in the order they end. Completions do not depend on batch_size.

    cuda_graph: steps are captured where they can be (see graph.py); on a CPU they are the same, uncaptured.

    Out of memory halves the batch, says so and goes on; with one row it is an error. Raises ValueError naming
    the problem and the step where logits or Delta are not finite.
    """
    waiting = {request.id: request for request in requests}
    assert len(waiting) == len(requests), "request ids must differ"
    is_static = cuda_graph or models.allowed_V.device.type == "cuda"
    if cuda_graph and (reason := graph.obstacle(models)):
        print(f"cuda_graph=true: {reason}: steps run uncaptured", flush=True)
        cuda_graph = False
    while waiting:
        try:
            num_slots = min(batch_size, len(waiting))
            size = num_positions(requests, forcing)
            decoder = Decoder(models, rule, seed, num_slots, size, forcing, is_static, cuda_graph)
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


def num_positions(requests, forcing):
    """Tokens that the longest row may come to."""
    longest = max((len(r.prompt_ids) + r.max_new_tokens for r in requests), default=0)
    return longest + (forcing.max_ids + forcing.max_new_tokens if forcing else 0)


class Decoder:
    """The slots of one batch: what a step needs of each on the device, with the models' KV caches beside it.

    Rows are in slots 0..N-1, of which some may be parked: their row has ended, and they go on computing to no
    effect until they get another or the last rows take their places.

        is_static False   N is the number of rows, and the host looks at each step before it launches the next
        is_static True    N and the positions read are of few sizes, forced ids are always reckoned with, and
                          the host looks at a step once it has launched the next: what that samples for a row
                          that has ended is dropped. So a step depends on tensors alone and can be captured.
    """

    def __init__(
        self, models, rule, seed, num_slots, num_positions, forcing=None, is_static=False, is_captured=False
    ):
        models.try_length(num_positions)
        models.allocate(num_slots, num_positions)
        self.models, self.rule, self.seed, self.forcing = models, rule, seed, forcing
        self.num_slots, self.num_positions, self.is_static = num_slots, num_positions, is_static
        self.rows, self.pending, self.num_launched = [], deque(), 0  # rows: of each slot a Row, or None
        self.counts = static_counts(num_slots) if is_static else range(num_slots + 1)
        self.most_pending = int(is_static and models.corruption is None)  # the host corrupts at each step
        self.graphs = graph.Graphs() if is_captured else None
        self.device = models.allowed_V.device
        self.is_eos_V = torch.zeros_like(models.allowed_V)
        self.is_eos_V[sorted(models.eos)] = True
        self.given_BM = torch.zeros(num_slots, num_positions, dtype=torch.int64, device=self.device)
        # newest token, random key, tokens sampled, tokens in the caches, how many a forced row has until it
        # goes on by itself (0: not forced), and by how much a step moves the row on: 0 in a parked slot
        self.state_6B = torch.zeros(6, num_slots, dtype=torch.int64, device=self.device)

    @property
    def active(self):
        """The rows that are being decoded, by slot."""
        return [row for row in self.rows if row is not None]

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
        delta_GV = self.models.proxy.prefill(prompts, slots) if self.models.proxy else None
        cpu.give_back_freed_memory()
        rows = [self.new_row(request, slot) for request, slot in zip(group, slots, strict=True)]
        # one position before where they are: `sample` moves them on
        state_6G = self.to_device([[0, row.key, 0, row.num_cached - 1, 0, 1] for row in rows]).T.contiguous()
        record_4G = self.sample(logits_GR, delta_GV, state_6G, rows)
        self.state_6B[:, self.to_device(slots)] = state_6G
        yield from self.look_at(record_4G, rows)

    def new_row(self, request, slot):
        """A row whose prompt has been read."""
        key, length = sampling.row_key(self.seed, request.id), len(request.prompt_ids)
        self.rows[slot] = Row(request, request.max_new_tokens, key, slot, length, self.num_launched)
        return self.rows[slot]

    def step(self):
        """Run every row's last token through the models and sample the next."""
        self.close_ranks()
        active = self.active
        length = 1 + max(row.num_cached for row in active)
        if self.is_static:
            length = min(whole(length, STATIC_POSITIONS), self.num_positions)
        sizes = len(self.rows), length
        record_4N = self.graphs.step(self, *sizes) if self.graphs else self.advance(*sizes)[0]
        for row in active:
            row.num_cached += 1
        yield from self.look_at(record_4N, list(self.rows))

    def advance(self, num_rows, length):
        """A step of slots 0..num_rows-1, which reads `length` positions of each: (record, logits, Delta).

        All of it is on the device: see `sample`.
        """
        active, state_6N, given_NM = self.active, self.state_6B[:, :num_rows], None
        last_N, _, _, lengths_N, _, _ = state_6N
        logits_NR, delta_NV = self.models.teacher.step(last_N, lengths_N, length - 1), None
        if self.models.proxy and (self.is_static or not all(row.response for row in active)):
            delta_NV = self.models.proxy.step(last_N, lengths_N, length - 1)
        if self.forcing and (self.is_static or any(row.response for row in active)):
            given_NM = self.given_BM[:num_rows]
        return self.sample(logits_NR, delta_NV, state_6N, self.rows, given_NM), logits_NR, delta_NV

    def sample(self, logits_NR, delta_NV, state_6N, rows, given_NM=None):
        """Sample a token for each of the rows, whose state moves on.

        Returns float32 (4, N): its id (which float32 holds up to 2^24), whether that ends a row, its
        log-probability under the unadjusted teacher (NaN if one of the row's logits is NaN or +inf), and the
        sum of the row's Delta. given_NM: forced ids at their places, where rows may be forced.
        """
        last_N, keys_N, steps_N, _, num_given_N, pace_N = state_6N
        log_probs_NV = sampling.log_probs(logits_NR, self.models.allowed_V)
        tokens_N = sampling.sample(log_probs_NV, delta_NV, self.rule, keys_N, steps_N)
        if self.models.corruption:
            tokens_N = self.corrupt(tokens_N, rows)
        if given_NM is not None:
            tokens_N = torch.where(num_given_N > 0, log_probs_NV.argmax(-1), tokens_N)
            given_N = given_NM.gather(1, steps_N[:, None]).squeeze(1)
            tokens_N = torch.where(steps_N < num_given_N, given_N, tokens_N)
        last_N.copy_(tokens_N)
        state_6N[2:4].add_(pace_N)
        chosen_N = log_probs_NV.gather(1, tokens_N[:, None]).squeeze(1)
        sums_N = torch.zeros_like(chosen_N) if delta_NV is None else delta_NV.sum(-1)
        return torch.stack([tokens_N.float(), self.is_eos_V[tokens_N].float(), chosen_N, sums_N])

    def look_at(self, record_4N, rows):
        """Take in what was sampled for the rows, or what was before that; yield the rows that ended."""
        self.pending.append(Pending(self.num_launched, rows, record_4N))
        self.num_launched += 1
        while len(self.pending) > self.most_pending:
            yield from self.take_in(self.pending.popleft())

    def take_in(self, pending):
        ended, bad = [], None
        for row, token, is_end, log_prob, delta in zip(pending.rows, *pending.read(), strict=True):
            if row is None or pending.number < row.since:
                continue
            row.ids.append(int(token))
            row.log_prob += log_prob
            if math.isnan(log_prob) or not math.isfinite(delta):
                bad = row, math.isnan(log_prob)
            elif (is_end and len(row.ids) > row.num_given) or len(row.ids) == row.limit:
                ended.append((row, bool(is_end)))
        for row, finished in reversed(ended):
            yield from self.end(row, finished)
        if bad:  # only now: what ended in the same step is kept
            row, is_teacher = bad
            raise_not_finite(row.request.id, len(row.ids) - 1, is_teacher)

    def corrupt(self, tokens_N, rows):
        """The sampled tokens with those of results replaced, where they are to be."""
        tokens = tokens_N.tolist()
        for k, row in enumerate(rows):
            if row and not row.response and tokens[k] in self.models.corruption.shapes:
                ids = [*row.ids, tokens[k]]
                tokens[k] = self.models.corruption.replace(ids, torch.tensor(row.key))
        return tokens_N.new_tensor(tokens)

    def end(self, row, finished):
        """Yield the row's Completion, unless its response has only now ended and a forced part follows."""
        if row.response is None:
            row.response = Completion(row.request.id, list(row.ids), finished, row.log_prob)
            if self.forcing:
                self.force(row)
                return
        else:
            row.response = replace(row.response, forced_ids=row.ids[row.num_given :])
        self.release(row)
        yield row.response

    def force(self, row):
        """Give the row the ids that follow its response; those it samples after them are greedy.

        A step launched before the end was seen has moved the row on: it goes back, and what that step put
        into the caches is overwritten.
        """
        given = self.forcing.ids_of(row.request, row.response.ids)
        row.response = replace(row.response, given_ids=given)
        start = len(row.ids) - row.response.finished
        row.num_given, row.since = start + len(given), self.num_launched
        row.limit = row.num_given + self.forcing.max_new_tokens
        row.num_cached = len(row.request.prompt_ids) + len(row.ids) - 1
        newest = given[0] if row.response.finished and given else row.ids[-1]
        state = [newest, row.key, len(row.ids), row.num_cached, row.num_given, 1]
        self.given_BM[row.slot, start : row.num_given] = self.to_device(given)
        self.state_6B[:, row.slot] = self.to_device(state)

    def release(self, row):
        """Take a row out: its slot is parked."""
        self.models.release(row.slot, row.slot, 0)
        self.state_6B[:, row.slot] = 0
        self.rows[row.slot], row.since = None, math.inf

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
    """What a step sampled for rows, on its way to the host; number: how many were launched before it."""

    def __init__(self, number, rows, record_4N):
        self.number, self.rows = number, rows
        self.record_4N = record_4N.to("cpu", non_blocking=True)  # from CUDA into pinned memory
        stream = torch.cuda.current_stream(record_4N.device) if record_4N.is_cuda else None
        self.copied = stream and stream.record_event()

    def read(self):
        if self.copied is not None:
            self.copied.synchronize()
        return self.record_4N.tolist()


def static_counts(num_slots):
    """The numbers of slots that static steps have."""
    return sorted({0, min(16, num_slots), -(-num_slots // 4), -(-num_slots // 2), num_slots})


def raise_not_finite(problem_id, step, is_teacher):
    model = "teacher's logits" if is_teacher else "proxy's Delta"
    raise UserError(
        f"problem {problem_id}, response token {step}: the {model} are not finite (NaN or infinite): "
        "check the weights, or use dtype=bfloat16 or float32"
    )
