"""Causal language models: loading them, and decoding with a cache of slots (see cache.py).

Shapes: B rows given, N active slots, T tokens given, C tokens of a chunk, L positions read, V logit rows.
"""

import contextlib
import ctypes
import functools
import sys
import tempfile

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from ads import decoder, dual, memory
from ads.cache import Pages, Placement, SlotCache, Slots
from ads.dual import TRIED, is_out_of_memory
from ads.stage import errors, hub
from ads.stage.inputs import check_no_adapter

# Settings of torch for CUDA, which all who build models need; on a CPU they change nothing. cuDNN's attention
# makes a plan for each new shape, in which time other kernels do many steps. Sums of a product's parts stay
# float32: in 16 bits logits would depend more on how kernels cut a product up, and so on the number of rows.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

ATTENTION_KINDS = ("full_attention", "sliding_attention")
# memory.PREFILL_TOKENS of a CPU in float32, where more take hardly less time per token; of 16 bits twice as
# many, in the same room.
CPU_PREFILL_TOKENS = 512
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
TRIED_WINDOW = 6
NUM_SHORT = 9  # tokens of the shorter of two rows


def load_model(name, dtype, device, attn_implementation="auto"):
    """The causal language model `name` (folder or hub name), in eval mode; ValueError when that fails.

    dtype "auto" is bfloat16 on CUDA, float32 elsewhere; attention "auto" is the library's choice.
    """
    attention = None if attn_implementation == "auto" else attn_implementation
    check_no_adapter(name)
    where, commit = hub.locate(name, "model")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            revision=commit,
            dtype=resolve_dtype(dtype, device),
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            use_safetensors=True,  # no pickle
        )
    except Exception as error:  # whatever a folder that does not hold together makes the library raise
        raise ValueError(f"model {name!r} could not be loaded: {errors.reason(error)}") from error
    check_weights(name, report)
    return model.to(device).eval()


def check_weights(name, report):
    """ValueError unless a model folder has all weights in their shapes; the library would make up others.

    report: what the library tells of a load. Weights that the model has no place for are said.
    """
    if wrong := sorted(report["mismatched_keys"]):
        key, stored, wanted = wrong[0]
        raise ValueError(
            f"model {name!r}: weights and config.json do not belong together: {key} is {tuple(stored)}, "
            f"by the configuration {tuple(wanted)} ({len(wrong)} weights differ)"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model {name!r} is not complete: {len(missing)} weights missing, such as {missing[0]}"
        )
    if unused := sorted(report["unexpected_keys"]):
        print(
            f"WARNING: model {name!r} has no use for {len(unused)} weights, such as {unused[0]}", flush=True
        )


def sdpa(module, query, key, value, attention_mask, is_causal=None, **others):
    """The library's sdpa attention, with keys repeated where a GPU would else hold a row's whole scores.

    The library leaves it to torch that heads share keys wherever there is no mask. Of torch's kernels on CUDA
    flash attention alone can do that, which takes no float32: (H, T, T) scores of each layer would be kept.
    """
    if query.is_cuda and query.dtype == torch.float32:
        return sdpa_repeated(module, query, key, value, attention_mask, is_causal, **others)
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=is_causal, **others)


def sdpa_repeated(module, query, key, value, attention_mask, is_causal=None, **others):
    """sdpa with a copy of the keys and values for each head of queries, which any kernel takes."""
    num_groups = getattr(module, "num_key_value_groups", 1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    has_no_groups = torch.nn.Identity()
    return sdpa_attention_forward(
        has_no_groups, query, key, value, attention_mask, is_causal=is_causal, **others
    )


AttentionInterface.register("sdpa", sdpa)


@contextlib.contextmanager
def recomputed(model, is_on=True):
    """A context in which layers keep no activations for the backward pass, which makes them again.

    The library's own gradient checkpointing works in training mode alone, and that lets in dropout, in
    whatever form and under whatever name a model has it; here mode and gradient stay what they are. Cached
    keys would be written twice: pass use_cache=False. ValueError for a model without layers to recompute.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if is_on else []
    if is_on and not layers:
        kind = model.config.model_type
        raise ValueError(f"gradient_checkpointing=true: a {kind!r} model has no layers for it; set false")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def check_loadable(model):
    """ValueError unless the library can load a model that is saved: it cannot load parts of some."""
    kind = model.config.model_type
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        try:
            is_known = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
        except ValueError:  # of no type that it knows
            is_known = False
    if not is_known:
        raise ValueError(f"a {kind!r} model could not be loaded again once saved: choose another student")


def logits_of(model, ids):
    """Logits (T, V) of one row."""
    ids_1T = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0]


def longest_without(flaw_at, fitting, failing):
    """The largest length below `failing` that has no flaw, by bisection; `fitting` has none."""
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (fitting, middle) if flaw_at(middle) else (middle, failing)
    return fitting


def try_batches(model, longest, dtype=torch.float32):
    """ValueError where a model cannot be trained, or differentiated, on sequences of up to `longest` tokens.

    It may have fewer positions, look at later tokens and so at padding (attention that is not causal, angles
    that follow the longest row, keys chosen among those of all tokens), have logits that are not finite, or
    not run at all. The cost is 3.4 forward passes of `longest` tokens and a backward pass of a few.
    Gradients are left empty. dtype: that of the passes' matrix products.
    """
    is_training, kind = model.training, model.config.model_type
    model.eval()  # dropout would change logits
    flaw_at = functools.partial(flaw_of_batch, model, dtype)
    reason = flaw_at(longest)
    fitting = longest_without(flaw_at, 0, longest) if reason else longest
    model.train(is_training)
    if not reason:
        return
    if fitting <= NUM_SHORT:
        raise ValueError(
            f"model type {kind!r} cannot be trained in padded batches ({reason}): take another model"
        )
    raise ValueError(
        f"sequences come to {longest} tokens, but padded batches of model type {kind!r} are right only up to "
        f"{fitting} ({reason}): set max_length={fitting}"
    )


def flaw_of_batch(model, dtype, longest):
    """What is wrong with the logits of a row of so many tokens, beside those of its parts; else None."""
    ids = dual.tried_ids(model, longest)
    lengths = sorted(
        {max(1, n) for n in (min(NUM_SHORT, longest), longest // 2, 9 * longest // 10, longest - 1)}
    )
    device = model.get_input_embeddings().weight.device
    ids_1T, last_C = torch.tensor([ids], device=device), torch.tensor(lengths, device=device) - 1
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with CheckedLookups(), torch.no_grad():
                found = model(input_ids=ids_1T, use_cache=False, logits_to_keep=last_C).logits[0]
                parts = [model(input_ids=ids_1T[:, :n], use_cache=False, logits_to_keep=1) for n in lengths]
            logits_V = model(input_ids=ids_1T[:, :NUM_SHORT], use_cache=False).logits[0, -1]
        logits_V.float().logsumexp(-1).backward()
        model.zero_grad()
    except Exception as error:  # whatever a family raises
        if is_out_of_memory(error):
            raise
        return errors.reason(error)
    wanted_CV = torch.stack([part.logits[0, -1] for part in parts])
    if not wanted_CV.isfinite().all():
        raise ValueError(f"logits of the {model.config.model_type!r} model are not finite: check its weights")
    if len(found) > len(lengths):  # of all tokens: some families do not know logits_to_keep
        found = found[last_C]
    are_same = all(is_right(a[None], b[None]) for a, b in zip(found, wanted_CV, strict=True))
    return None if are_same else "logits change with the tokens that follow"


class CheckedLookups(TorchDispatchMode):
    """A context in which an index beyond a table is an IndexError: a GPU would give up its process."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        for dim, ids in lookups(function.overloadpacket, arguments):
            if ids is not None and ids.dtype in (torch.int32, torch.int64) and ids.numel():
                last, size = int(ids.max()), arguments[0].shape[dim]
                if last >= size:
                    raise IndexError(f"position {last} of a table of {size}")
        return function(*arguments, **(keywords or {}))


def lookups(operation, arguments):
    """[(dimension, ids)] by which an operation reads from its first argument."""
    if operation is torch.ops.aten.embedding:
        return [(0, arguments[1])]
    if operation is torch.ops.aten.index:
        return list(enumerate(arguments[1]))
    return [arguments[1:3]] if operation in (torch.ops.aten.gather, torch.ops.aten.index_select) else []


def free_bytes(device):
    """Memory that can still be taken on a device; on the CPU that of the whole machine."""
    if torch.device(device).type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def give_back_freed_memory():
    """To the system: glibc would keep the room of weights that were fused and of prompts that were read."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory(device):
    """For the next tensors: glibc would unmap each large one, and page faults slow training passes down.

    Nothing is kept where the tensors are on another device than the CPU.
    """
    is_cpu = torch.device(device).type == "cpu"
    if is_cpu and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def resolve_dtype(dtype, device):
    """The torch dtype of a config's dtype key."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, dtype)


class CachedModel:
    """A causal language model with its slots. Returns next-token logits; of all tokens only `extend`."""

    def __init__(self, model, make_cache=SlotCache, may_fuse=True):
        """may_fuse: decoder.py may move the weights into fused matrices; False leaves the model as it is."""
        self.model, self.make_cache = model, make_cache
        self.windows = attention_windows(model.config)
        self.cache, self.layers = None, None
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        on_cpu = CPU_PREFILL_TOKENS * torch.float32.itemsize // self.dtype.itemsize
        self.prefill_tokens = on_cpu if self.device.type == "cpu" else memory.PREFILL_TOKENS
        self.own_step = None
        if may_fuse:
            self.own_step = decoder.make_step(getattr(model, "library", model), self.windows)
        self.num_tried = TRIED  # positions that rows are known to be decoded right within
        with self.narrow_windows():
            self.try_out()
        give_back_freed_memory()

    @torch.no_grad()
    def try_out(self):
        """See that the cache changes nothing, on two rows of few tokens, one with a prompt in two chunks.

        ValueError in one line where a row alone and without a cache has other logits, or the library fails.
        What a position of the cache takes, and whether decoder.py's step is the library's, is found on the
        way. The cost is that of about 100 tokens.
        """
        rows = self.tried_rows()
        try:
            found = self.decode_tried(rows)
            wanted = self.alone(rows)
        except Exception as error:  # whatever a family raises that is not made to be called like this
            if is_out_of_memory(error):
                raise
            raise ValueError(self.refusal(errors.reason(error))) from error
        if not self.bytes_per_position:
            raise ValueError(self.refusal("it keeps no keys and values in the cache it is given"))
        if not is_right(found, wanted):
            raise ValueError(self.refusal("its logits with a cache are not those without"))
        if self.own_step is not None:
            try:
                may_stay = decoder.agrees(self.own_step(*self.last_tokens(rows), self.cache), found)
            except (TypeError, ValueError, LookupError, RuntimeError):
                # modules of the same names that are called otherwise
                may_stay = False
            if not may_stay:
                kind = self.model.config.model_type
                print(f"model type {kind!r} is decoded by the library's own forward, not by ours", flush=True)
                self.own_step = None
        self.cache = None

    @contextlib.contextmanager
    def narrow_windows(self):
        """A context in which few tokens go beyond the attention windows, the library's and ours."""
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

    def tried_rows(self):
        """Two rows of ids, of TRIED and of fewer tokens."""
        ids = dual.tried_ids(self.model, TRIED + NUM_SHORT)
        return ids[:TRIED], ids[TRIED:]

    def decode_tried(self, rows):
        """Logits (2, V) after the rows: all but their last tokens are prompts."""
        self.allocate(2, TRIED)
        usual, self.prefill_tokens = self.prefill_tokens, TRIED  # for two rows, so in chunks of half of it
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
        return dual.stack(logits) if isinstance(logits[0], dual.Dual) else torch.cat(logits)

    @torch.no_grad()
    def try_length(self, num_positions):
        """ValueError where rows of so many tokens would be decoded wrong, with how many would not.

        There are tables of positions, and angles and windows that follow the longest row of a batch. Tried
        with a row of few tokens beside one that is as long and empty, so the cost is that of few tokens and
        of a cache for two rows.
        """
        if num_positions <= self.num_tried:
            return
        if reason := self.flaw_at(num_positions):
            fitting = longest_without(self.flaw_at, self.num_tried, num_positions)
            raise ValueError(
                f"rows may come to {num_positions} tokens, but model type {self.model.config.model_type!r} "
                f"is decoded right only up to {fitting} ({reason}): "
                f"lower max_length by {num_positions - fitting}"
            )
        self.num_tried = num_positions

    def flaw_at(self, length):
        """What is wrong with the logits of a row of few tokens beside one of so many; None if nothing is."""
        row = self.tried_rows()[1]
        tokens_2, lengths_2, _ = self.last_tokens([row, row])
        lengths_2[1] = length - 1
        self.allocate(2, length)
        try:
            with CheckedLookups():
                self.prefill_group([row[:-1], row[:-1]], 0)
                found = self.step(tokens_2, lengths_2, length - 1)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return errors.reason(error)
        finally:
            self.cache = None
        found = dual.rows(found, 0, 1) if isinstance(found, dual.Dual) else found[:1]
        if is_right(found, self.alone([row])):
            return None
        return "its short rows follow the longest of the batch, or change as they grow"

    def refusal(self, reason):
        """The line that says why a model is not taken, and what to do."""
        kind = self.model.config.model_type
        if isinstance(self.model, dual.DualModel):
            return f"the exact Delta does not cover model type {kind!r} ({reason}): set eps above 0"
        return f"model type {kind!r} cannot be decoded in batches with a cache ({reason}): take another model"

    @torch.inference_mode(False)  # outside of it nothing may write to what was made in it, as dual numbers do
    def allocate(self, num_slots, num_positions):
        """Replace the cache by an empty one."""
        self.cache = None  # its room may be needed
        make_storage = functools.partial(Slots, layers=self.layers)
        if self.own_step is not None and self.own_step.compiled:
            make_storage = functools.partial(Pages, num_layers=len(self.own_step.layers))
        self.cache = self.make_cache(make_storage, num_slots, num_positions)

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
        """See prefill. Long prompts go chunk by chunk.

        Rows are padded on the left: the last column is every row's last token, and only its logits are made.
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
            # the first chunk attends to itself, where padding is put later than any query and never seen
            read, key_positions_BL = None, positions_BC.masked_fill(positions_BC < 0, width)
            if first:  # of one long prompt, or where slots follow one another
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
        """Append one token to each active slot and return the logits (N, V) that follow it.

        lengths_N: tokens already in each slot; longest: their maximum (an int, so that nothing waits for the
        device).
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


def is_right(found, wanted):
    """Whether logits are those wanted; where these are not finite, that is for the sampled row to say."""
    return not wanted.as_subclass(torch.Tensor).isfinite().all() or decoder.agrees(found, wanted, slack=2)


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
        raise ValueError(
            f"model type {config.model_type!r} has {', '.join(unknown)} layers; "
            f"decoding supports {' and '.join(ATTENTION_KINDS)}: take another model"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
