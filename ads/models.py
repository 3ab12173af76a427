"""Causal language models: loading them, and decoding with a cache of slots (see cache.py).

Shapes: B rows given, N active slots, T tokens given, L positions read, V logit rows.
"""

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from ads import decoder
from ads.cache import Placement, SlotCache

ATTENTION_KINDS = ("full_attention", "sliding_attention")


def load_model(name, dtype, device, attn_implementation="auto"):
    """The causal language model `name` (folder or hub name), in eval mode; ValueError when that fails.

    dtype "auto" is bfloat16 on CUDA, float32 elsewhere; attention "auto" is the library's choice.
    """
    attention = None if attn_implementation == "auto" else attn_implementation
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=resolve_dtype(dtype, device),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {name!r} could not be loaded: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model {name!r} is not complete: {len(missing)} weights missing, such as {missing[0]}"
        )
    return model.to(device).eval()


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
        self.own_step = decoder.make_step(getattr(model, "library", model), self.windows)
        if self.own_step is not None and not self.is_own_step_right():
            self.own_step = None

    def is_own_step_right(self):
        """Whether decoder.py's step computes what the library's does, on an example."""
        num_rows = self.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(24) * 7919 % num_rows).tolist()
        self.allocate(2, 16)
        self.prefill([ids[:14], ids[14:23]], 0)
        given = torch.tensor([ids[23], ids[0]], device=self.device), torch.tensor([14, 9], device=self.device)
        wanted = self.library_step(*given, 14)
        try:
            found = self.own_step(*given, 14, self.cache)
        except (TypeError, RuntimeError):  # modules of the same names that are called otherwise
            return False
        finally:
            self.cache = None
        return decoder.agrees(found, wanted)

    def allocate(self, num_slots, num_positions):
        """Replace the cache by an empty one."""
        self.cache = self.make_cache(num_slots, num_positions)

    def move(self, source, target, length):
        """Copy the first `length` positions of one slot over another."""
        self.cache.move(source, target, length)

    @torch.no_grad()
    def prefill(self, prompts, first_slot):
        """Fill slots from first_slot on with prompts (lists of ids); logits (B, V) after the last token.

        Rows are padded on the left: the last column is every row's last token, and only its logits are made.
        """
        width = max(map(len, prompts))
        padding_B = torch.tensor([width - len(ids) for ids in prompts])
        ids_BT = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        positions_BT = torch.arange(width) - padding_B[:, None]
        rows, columns = (positions_BT >= 0).nonzero(as_tuple=True)
        place = Placement(rows, columns, rows + first_slot, positions_BT[rows, columns], read=None)
        # padding is put later than any query, where it is never seen
        key_positions_BT = positions_BT.masked_fill(positions_BT < 0, width)
        return self.forward(ids_BT, positions_BT.clamp(min=0), key_positions_BT, place)

    @torch.no_grad()
    def step(self, tokens_N, lengths_N, longest):
        """Append one token to each active slot and return the logits (N, V) that follow it.

        lengths_N: tokens already in each slot; longest: their maximum (an int, so that nothing waits for the
        device).
        """
        if self.own_step is not None:
            return self.own_step(tokens_N, lengths_N, longest, self.cache)
        return self.library_step(tokens_N, lengths_N, longest)

    def library_step(self, tokens_N, lengths_N, longest):
        num_active = len(tokens_N)
        slots_N = torch.arange(num_active, device=self.device)
        place = Placement(
            slots_N, torch.zeros_like(slots_N), slots_N, lengths_N, read=(num_active, longest + 1)
        )
        key_positions_BL = torch.arange(longest + 1, device=self.device).expand(num_active, -1)
        return self.forward(tokens_N[:, None], lengths_N[:, None], key_positions_BL, place)

    def forward(self, ids_BT, positions_BT, key_positions_BL, place):
        self.cache.placement = Placement(
            place.rows.to(self.device),
            place.columns.to(self.device),
            place.slots.to(self.device),
            place.positions.to(self.device),
            place.read,
        )
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
