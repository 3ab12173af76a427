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
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from ads import decoder, store
from ads.cache import Pages, Placement, SlotCache, Slots

ATTENTION_KINDS = ("full_attention", "sliding_attention")
# Prompts run through a model in pieces of at most this many tokens, padding included: more would take more
# room and, on a CPU, hardly less time per token.
PREFILL_TOKENS = 16384
CPU_PREFILL_TOKENS = 512  # in float32; of 16 bits, twice as many in the same room
# for check_causal: shares of a sequence's tokens but the last, and tokens that a backward pass is tried on
PREFIXES, BACKWARD_TOKENS = (1 / 2, 9 / 10, 1), 16
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def load_model(name, dtype, device, attn_implementation="auto"):
    """The causal language model `name` (folder or hub name), in eval mode; ValueError when that fails.

    dtype "auto" is bfloat16 on CUDA, float32 elsewhere; attention "auto" is the library's choice.
    """
    attention = None if attn_implementation == "auto" else attn_implementation
    store.check_no_adapter(name)
    where, commit = store.locate(name, "model")
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
        raise ValueError(f"model {name!r} could not be loaded: {store.reason(error)}") from error
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


def check_causal(model, ids, dtype):
    """ValueError unless logits are finite, have a gradient and hang on no later token, and so on no padding.

    ids: a sequence as long as any. dtype: that of the passes' matrix products.
    """
    device = model.get_input_embeddings().weight.device.type
    lengths = [max(1, int(share * (len(ids) - 1))) for share in PREFIXES]
    kind = model.config.model_type
    try:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            with torch.no_grad():
                whole_TV = logits_of(model, ids)
                parts = (logits_of(model, ids[:length]) for length in lengths)
                are_same = [decoder.agrees(part_LV, whole_TV[: len(part_LV)]) for part_LV in parts]
            logits_of(model, ids[:BACKWARD_TOKENS]).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ValueError(f"a {kind!r} model cannot be trained here: {store.reason(error)}") from error
    model.zero_grad()
    if not whole_TV.isfinite().all():
        raise ValueError(f"logits of the {kind!r} model are not finite: check its weights")
    if not all(are_same):
        # beyond some length: RoPE that depends on it, and keys chosen from those of all tokens
        raise ValueError(
            f"a {kind!r} model cannot be trained on {len(ids)} tokens: its logits change with those that "
            "follow; lower max_length, or choose another model"
        )


def logits_of(model, ids):
    """Logits (T, V) of one row."""
    ids_1T = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    return model(input_ids=ids_1T, use_cache=False).logits[0]


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


def keep_freed_memory():
    """For the next tensors: glibc would unmap each large one, and page faults slow training passes down."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def resolve_dtype(dtype, device):
    """The torch dtype of a config's dtype key."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, dtype)


class CachedModel:
    """A causal language model with its slots. Returns next-token logits, never those of other positions."""

    def __init__(self, model, make_cache=SlotCache):
        self.model, self.make_cache = model, make_cache
        self.windows = attention_windows(model.config)
        self.cache = None
        self.device = model.get_input_embeddings().weight.device
        self.dtype = model.get_input_embeddings().weight.dtype
        on_cpu = CPU_PREFILL_TOKENS * torch.float32.itemsize // self.dtype.itemsize
        self.prefill_tokens = on_cpu if self.device.type == "cpu" else PREFILL_TOKENS
        self.own_step = decoder.make_step(getattr(model, "library", model), self.windows)
        self.try_out()
        give_back_freed_memory()

    @torch.no_grad()
    def try_out(self):
        """Find out what a position of the cache takes, and whether decoder.py's step is the library's."""
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(24) * 7919 % num_rows).tolist()
        self.allocate(2, 16)
        self.prefill_group([ids[:14], ids[14:23]], 0)
        self.bytes_per_position = self.cache.storage.bytes_per_position
        if self.own_step is not None:
            given = [ids[23], ids[0]], [14, 9]
            given_2N = torch.tensor(given, device=self.device)
            wanted = self.library_step(*given_2N, 14)
            try:
                is_right = decoder.agrees(self.own_step(*given_2N, 14, self.cache), wanted)
            except (TypeError, ValueError, LookupError, RuntimeError):
                # modules of the same names that are called otherwise
                is_right = False
            self.own_step = self.own_step if is_right else None
        self.cache = None

    def allocate(self, num_slots, num_positions):
        """Replace the cache by an empty one."""
        make_storage = Slots
        if self.own_step is not None and self.own_step.compiled:
            make_storage = functools.partial(Pages, num_layers=len(self.own_step.layers))
        self.cache = self.make_cache(make_storage, num_slots, num_positions)

    def release(self, slot, last, length):
        """A slot's row has ended: the last one, of `length` tokens, takes its place."""
        self.cache.storage.release(slot, last, length)

    @torch.no_grad()
    def prefill(self, prompts, first_slot):
        """Fill slots from first_slot on with prompts (lists of ids); logits (B, V) after the last token."""
        groups = self.groups(prompts)
        return torch.cat([self.prefill_group(prompts[g], first_slot + g.start) for g in groups])

    def groups(self, prompts):
        """Slices of the prompts that run through the model at once."""
        size = max(1, self.prefill_tokens // max(map(len, prompts)))
        return [slice(first, first + size) for first in range(0, len(prompts), size)]

    @torch.no_grad()
    def prefill_group(self, prompts, first_slot):
        """See prefill. Long prompts go chunk by chunk.

        Rows are padded on the left: the last column is every row's last token, and only its logits are made.
        """
        num_rows, width = len(prompts), max(map(len, prompts))
        padding_B = torch.tensor([width - len(ids) for ids in prompts])
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        positions_BT = torch.arange(width) - padding_B[:, None]
        chunk_size = max(1, self.prefill_tokens // num_rows)
        for first in range(0, width, chunk_size):
            ids_BC, positions_BC = (x[:, first : first + chunk_size] for x in (ids_BT, positions_BT))
            rows, columns = (positions_BC >= 0).nonzero(as_tuple=True)
            # the first chunk attends to itself, where padding is put later than any query and never seen
            read, key_positions_BL = None, positions_BC.masked_fill(positions_BC < 0, width)
            if first:
                read = first_slot, num_rows, int(positions_BC.max()) + 1
                key_positions_BL = torch.arange(read[2]).expand(num_rows, -1)
            place = Placement(rows, columns, rows + first_slot, positions_BC[rows, columns], read)
            logits_BV = self.forward(ids_BC, positions_BC.clamp(min=0), key_positions_BL, place)
        return logits_BV

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
        return self.forward(tokens_N[:, None], lengths_N[:, None], key_positions_BL, place)

    def forward(self, ids_BT, positions_BT, key_positions_BL, place):
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
            logits_to_keep=1,
        )
        return output.logits[:, -1]


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
            f"decoding supports {' and '.join(ATTENTION_KINDS)}"
        )
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}
