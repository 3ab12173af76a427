"""A causal language model with a KV cache of slots (see kv_cache.py): prefill, step, extend.

The model is one of the library's, plain or in dual numbers (dual/model.py), run by its own forward; a step of
a model built like Llama is run by llama_step.py instead. Before it is used, a model is tried on a few tokens:
batches, slots, chunks and our step must not change its logits.

Shapes: B rows given, N slots of a step, T tokens given, C tokens of a chunk, L positions read, V logits.
"""

import contextlib
import functools

import torch

from ads import cpu
from ads.decode import memory_plan
from ads.decode.llama_step import make_step
from ads.dual.model import DualModel, rows, stack
from ads.dual.rules import Dual
from ads.kv_cache import Placement, SlotCache, Slots
from ads.stage import errors
from ads.stage.errors import UserError
from ads.trials import (
    NUM_SHORT,
    TRIED,
    CheckedLookups,
    agrees,
    holds,
    is_out_of_memory,
    is_right,
    longest_without,
    tried_ids,
)

ATTENTION_KINDS = ("full_attention", "sliding_attention")
# On a CPU prompts run through a model in pieces of so many bytes for each number that a token has (512 tokens
# in float32): larger ones take more room and hardly less time per token.
CPU_PREFILL_BYTES = 2048
TRIED_WINDOW = 6  # tokens: fewer than rows are tried with, so that a window that is not kept to is found


class CachedModel:
    """A causal language model with its slots. Returns next-token logits; of all tokens only `extend`."""

    def __init__(self, model, may_fuse=True):
        """may_fuse: llama_step.py may move the weights into fused matrices; False leaves them as they are."""
        self.model, self.is_dual = model, isinstance(model, DualModel)
        self.windows = attention_windows(model.config)
        self.cache, self.layers = None, None
        table = model.get_input_embeddings().weight
        self.device, self.dtype = table.device, table.dtype
        on_cpu = CPU_PREFILL_BYTES // self.dtype.itemsize
        self.prefill_tokens = on_cpu if self.device.type == "cpu" else memory_plan.PREFILL_TOKENS
        self.prefill_tokens //= 2 if self.is_dual else 1  # derivatives take as much room as values
        library_model = model.library if self.is_dual else model
        self.own_step = make_step(library_model, self.windows) if may_fuse else None
        self.num_tried = TRIED  # rows of so many tokens are known to be decoded right
        with self.narrow_windows():
            self.try_out()
        cpu.give_back_freed_memory()

    @torch.no_grad()
    def try_out(self):
        """See that the cache changes nothing, on two rows of few tokens, one with a prompt in two chunks.

        ValueError in one line where a row alone and without a cache has other logits, or the library fails.
        On the way are found the bytes that a position of the cache takes, and whether our own step gives
        what the library's does. The cost is that of about 150 tokens.
        """
        try:
            is_same = holds(self.is_cache_right, self.dtype)
        except Exception as error:  # whatever a family raises that is not made to be called like this
            if is_out_of_memory(error):
                raise
            raise UserError(self.refusal(errors.reason(error))) from error
        if not self.bytes_per_position:
            raise UserError(self.refusal("it keeps no keys and values in the cache it is given"))
        if not is_same:
            raise UserError(self.refusal("its logits with a cache are not those without"))
        if self.own_step is not None and not self.can_step():
            kind = self.model.config.model_type
            print(f"model type {kind!r} is decoded by the library's own forward, not by ours", flush=True)
            self.own_step = None
        self.cache = None

    def is_cache_right(self, attempt):
        rows = self.tried_rows(attempt)
        found = self.decode_tried(rows)
        return is_right(found, self.alone(rows))

    def can_step(self):
        try:
            return holds(self.is_own_step_right, self.dtype)
        except (TypeError, ValueError, LookupError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return False  # modules of the same names as Llama's that are called otherwise

    def is_own_step_right(self, attempt):
        rows = self.tried_rows(attempt)
        wanted = self.decode_tried(rows)
        return agrees(self.own_step(*self.last_tokens(rows), self.cache), wanted)

    @contextlib.contextmanager
    def narrow_windows(self):
        """A context in which attention windows, the library's and ours, are shorter than the rows tried."""
        config, windows = self.model.config.get_text_config(decoder=True), dict(self.windows)
        if any(windows.values()):
            self.windows.update({kind: window and TRIED_WINDOW for kind, window in windows.items()})
            usual, config.sliding_window = config.sliding_window, TRIED_WINDOW
        try:
            yield
        finally:
            if any(windows.values()):
                self.windows.update(windows)
                config.sliding_window = usual

    def tried_rows(self, attempt):
        """Two rows of ids, of TRIED and of fewer tokens."""
        ids = tried_ids(self.model, TRIED + NUM_SHORT, attempt)
        return ids[:TRIED], ids[TRIED:]

    def decode_tried(self, rows):
        """Logits (2, V) after the rows: all but their last tokens are prompts."""
        self.allocate(2, TRIED)
        usual, self.prefill_tokens = self.prefill_tokens, TRIED  # of two rows together: half of it a chunk
        self.prefill_group([row[:-1] for row in rows], 0)
        self.prefill_tokens = usual
        storage = self.cache.storage
        self.bytes_per_position = storage.bytes_per_position
        self.layers = storage.layers
        return self.library_step(*self.last_tokens(rows))

    def last_tokens(self, rows):
        """The rows' last tokens, as `step` takes them."""
        given = [row[-1] for row in rows], [len(row) - 1 for row in rows]
        return *torch.tensor(given, device=self.device), max(given[1])

    def alone(self, rows):
        """Logits after each row (B, V), as the library computes them of one row without a cache."""
        ids = [torch.tensor([row], device=self.device) for row in rows]
        logits = [self.model(input_ids=i, use_cache=False).logits[:, -1] for i in ids]
        return stack(logits) if isinstance(logits[0], Dual) else torch.cat(logits)

    @torch.no_grad()
    def try_length(self, num_positions):
        """ValueError where rows of so many tokens would be decoded wrong; it says which length would not.

        Some models have a table of so many positions; in some, angles or windows follow the longest row of
        the batch. Both are seen in the logits of a row of few tokens beside one that is said to be so long
        (its cache is empty), so the cost is that of few tokens and of a cache for two rows.
        """
        if num_positions <= self.num_tried:
            return
        if reason := self.flaw_at(num_positions):
            fitting = longest_without(self.flaw_at, self.num_tried, num_positions)
            raise UserError(
                f"rows may come to {num_positions} tokens, but model type {self.model.config.model_type!r} "
                f"is decoded right only up to {fitting} ({reason}): "
                f"lower max_length by {num_positions - fitting}"
            )
        self.num_tried = num_positions

    def flaw_at(self, length):
        """What is wrong with the logits of a row of few tokens beside one of so many; None if nothing is."""
        try:
            is_same = holds(functools.partial(self.is_length_right, length), self.dtype)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return errors.reason(error)
        finally:
            self.cache = None
        return None if is_same else "its short rows follow the longest of the batch, or change as they grow"

    def is_length_right(self, length, attempt):
        row = self.tried_rows(attempt)[1]
        tokens_2, lengths_2, _ = self.last_tokens([row, row])
        lengths_2[1] = length - 1
        self.allocate(2, length)
        with CheckedLookups():
            self.prefill_group([row[:-1], row[:-1]], 0)
            found = self.step(tokens_2, lengths_2, length - 1)
        found = rows(found, 0, 1) if isinstance(found, Dual) else found[:1]
        return is_right(found, self.alone([row]))

    def refusal(self, reason):
        """The line that says why a model is not taken, and what to do."""
        kind = self.model.config.model_type
        if self.is_dual:
            return f"the exact Delta does not cover model type {kind!r} ({reason}): set eps above 0"
        return f"model type {kind!r} cannot be decoded in batches with a cache ({reason}): take another model"

    @torch.inference_mode(False)  # what is made within it may not be written to outside, as dual numbers do
    def allocate(self, num_slots, num_positions):
        """Replace the cache by an empty one."""
        self.cache = None  # its room may be needed
        make_storage = functools.partial(Slots, layers=self.layers)
        if self.own_step is not None and self.own_step.compiled:
            make_storage = self.own_step.compiled.make_storage
        make_cache = self.model.make_cache if self.is_dual else SlotCache
        self.cache = make_cache(make_storage, num_slots, num_positions)

    def release(self, slot, last, length):
        """A slot's row has ended: the last one, of `length` tokens, takes its place."""
        self.cache.storage.release(slot, last, length)

    @torch.no_grad()
    def prefill(self, prompts, slots):
        """Fill slots with prompts (lists of ids); logits (B, V) after the last token.

        slots: one for each prompt, or the first of as many.
        """
        slots = each_slot(prompts, slots)
        return torch.cat([self.prefill_group(prompts[g], slots[g]) for g in self.groups(prompts)])

    def groups(self, prompts):
        """Slices of the prompts that run through the model at once."""
        size = max(1, self.prefill_tokens // max(map(len, prompts)))
        return [slice(first, first + size) for first in range(0, len(prompts), size)]

    @torch.no_grad()
    def prefill_group(self, prompts, slots):
        """Prefill of prompts that go through the model together, in chunks of columns where they are long.

        Rows are padded on the left, so that the last column has every row's last token: only its logits are
        made. Padding is not written to the cache.
        """
        num_rows, width = len(prompts), max(map(len, prompts))
        slots_B = torch.tensor(each_slot(prompts, slots))
        padding_B = torch.tensor([width - len(ids) for ids in prompts])
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        positions_BT = torch.arange(width) - padding_B[:, None]
        chunk_size = max(1, self.prefill_tokens // num_rows)
        for first in range(0, width, chunk_size):
            ids_BC, positions_BC = (x[:, first : first + chunk_size] for x in (ids_BT, positions_BT))
            rows, columns = (positions_BC >= 0).nonzero(as_tuple=True)
            # Nothing is cached yet, so the first chunk attends to itself. Left padding gets position `width`,
            # after every query, so the causal mask hides it. Later chunks attend to the cache; they are those
            # of one long prompt (or, in a trial, of prompts in slots that follow one another).
            read, key_positions_BL = None, positions_BC.masked_fill(positions_BC < 0, width)
            if first:
                read = int(slots_B[0]), num_rows, int(positions_BC.max()) + 1
                key_positions_BL = torch.arange(read[2]).expand(num_rows, -1)
            place = Placement(rows, columns, slots_B[rows], positions_BC[rows, columns], read)
            logits_B1V = self.forward(ids_BC, positions_BC.clamp(min=0), key_positions_BL, place)
        return logits_B1V[:, -1]

    @torch.no_grad()
    def extend(self, ids, length):
        """Append a list of tokens to slot 0, which holds `length`; the logits (T, V) that follow each."""
        rows, columns = torch.zeros(len(ids), dtype=torch.int64), torch.arange(len(ids))
        place = Placement(rows, columns, rows, columns + length, (0, 1, length + len(ids)))
        ids_1T, positions_1T = torch.tensor([ids]), (columns + length)[None]
        key_positions_1L = torch.arange(length + len(ids))[None]
        return self.forward(ids_1T, positions_1T, key_positions_1L, place, len(ids)).flatten(0, 1)

    @torch.no_grad()
    def step(self, tokens_N, lengths_N, longest):
        """Append one token to each of the slots 0..N-1 and return the logits (N, V) that follow it.

        lengths_N: tokens already in each slot; longest: their maximum or more, as an int: to ask the device
        for it would make the host wait.
        """
        if self.own_step is not None:
            return self.own_step(tokens_N, lengths_N, longest, self.cache)
        return self.library_step(tokens_N, lengths_N, longest)

    @torch.no_grad()
    def library_step(self, tokens_N, lengths_N, longest):
        num_active = len(tokens_N)
        slots_N = torch.arange(num_active, device=self.device)
        read = 0, num_active, longest + 1
        place = Placement(slots_N, torch.zeros_like(slots_N), slots_N, lengths_N, read)
        key_positions_BL = torch.arange(longest + 1, device=self.device).expand(num_active, -1)
        return self.forward(tokens_N[:, None], lengths_N[:, None], key_positions_BL, place)[:, -1]

    def forward(self, ids_BT, positions_BT, key_positions_BL, place, num_logits=1):
        """Logits (B, num_logits, V) after the last tokens."""
        tensors = place.rows, place.columns, place.slots, place.positions
        self.cache.place(Placement(*(x.to(self.device) for x in tensors), place.read))
        ids_BT, positions_BT = ids_BT.to(self.device), positions_BT.to(self.device)
        key_positions_BL = key_positions_BL.to(self.device)
        masks = {
            kind: additive_mask(positions_BT, key_positions_BL, window, self.dtype)
            for kind, window in self.windows.items()
        }
        # Models with one kind of layer take one mask, models that mix them take a mapping.
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        output = self.model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        return output.logits[:, -num_logits:]


def each_slot(prompts, slots):
    """A slot for each prompt, of these or of the first of them."""
    return list(range(slots, slots + len(prompts))) if isinstance(slots, int) else slots


def additive_mask(positions_BT, key_positions_BL, window, dtype):
    """(B, 1, T, L) to add to attention scores: a query sees keys up to its own position, within `window`."""
    distance_BTL = positions_BT[:, :, None] - key_positions_BL[:, None, :]
    seen_BTL = distance_BTL >= 0
    if window is not None:
        seen_BTL = seen_BTL & (distance_BTL < window)
    mask_BTL = torch.zeros(seen_BTL.shape, dtype=dtype, device=seen_BTL.device)
    return mask_BTL.masked_fill(~seen_BTL, torch.finfo(dtype).min)[:, None]


def attention_windows(config):
    """{kind of layer: attention window in tokens, or None} of a model's text layers.

    Raises ValueError for layers whose state is not keys and values of past tokens (linear attention, chunks,
    ...).
    """
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {"sliding_attention" if window else "full_attention": window}
    unknown = sorted(set(kinds) - set(ATTENTION_KINDS))
    if unknown:
        raise UserError(
            f"model type {config.model_type!r} has {', '.join(unknown)} layers; "
            f"decoding supports {' and '.join(ATTENTION_KINDS)}: take another model"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
