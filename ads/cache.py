"""A KV cache that has a write position per row.

A slot is one row of the batch. Active slots are always 0..n-1. Slots keeps each slot's positions together,
which attention reads as views:

    keys of one layer        position 0 ......................... S-1
    slot 0 (active)          [ prompt | response | next> |   free   ]
    slot 1 (active)          [ prompt | resp | next> |              ]
    slot 2 (released)        [                                      ]

Pages, which native.c reads, gives a slot room as it grows (paged attention: Kwon et al., 2023).

Shapes: B rows given, T tokens given, N rows read, S positions allocated, L positions read, H heads, D head
width; P pages of PAGE positions.
"""

import heapq
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import Cache

LANES = 16  # floats of a vector
PAGE = 64  # native.c has the same


@dataclass
class Placement:
    """Where the tokens of one forward pass go: token (row, column) is written to (slot, position)."""

    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    # (first slot, N, L) to attend to after writing; None: attend to the tokens given (a prompt's first chunk)
    read: tuple[int, int, int] | None


def whole(size, piece):
    """The size rounded up to whole pieces."""
    return -(-size // piece) * piece


class Slots:
    """Keys and values (B, H, S, parts, D) per layer, allocated once, written in place.

    num_parts: 2 in dual numbers, where the derivatives of a slot go by the slot num_slots slots further on.
    They lie at the same position, before the values, so that one product reads both (decoder.attend_dual).
    layers: those of an earlier cache of the model. Others get room at the first write, between activations of
    a prompt, which on a GPU leave behind pieces of memory too small for the next layer's keys.
    """

    def __init__(self, num_slots, num_positions, num_parts=1, layers=None):
        self.num_slots, self.num_positions, self.num_parts = num_slots, num_positions, num_parts
        self.keys, self.values = {}, {}
        for layer, like in (layers or {}).items():
            self.make_room(layer, *like)

    @property
    def layers(self):
        """{layer: (keys, values)} of no slots and no positions."""
        return {
            layer: tuple(stored[layer][:0, :, :0, 0].clone() for stored in (self.keys, self.values))
            for layer in self.keys
        }

    def reserve(self, slots, positions):
        """Have room for slots (B,) up to these positions (B,), of values and of derivatives."""

    def write(self, layer, keys_BHTD, values_BHTD, place):
        if layer not in self.keys:
            self.make_room(layer, keys_BHTD, values_BHTD)
        slots, parts = place.slots % self.num_slots, -1 - place.slots // self.num_slots
        for stored, given in ((self.keys[layer], keys_BHTD), (self.values[layer], values_BHTD)):
            stored[slots, :, place.positions, parts] = given[place.rows, :, place.columns]

    def make_room(self, layer, keys_BHTD, values_BHTD):
        """Keys and values of a layer, of the heads, widths and dtype of those given."""
        for stored, given in ((self.keys, keys_BHTD), (self.values, values_BHTD)):
            _, num_heads, _, width = given.shape
            shape = self.num_slots, num_heads, self.num_positions, self.num_parts, width
            stored[layer] = given.new_zeros(shape)

    def read(self, layer, first, num_rows, length):
        """Keys and values (N, H, L, D) of slots first, first + 1, ..."""
        part, first = divmod(first, self.num_slots)
        stored = self.keys[layer], self.values[layer]
        return tuple(x[first : first + num_rows, :, :length, -1 - part] for x in stored)

    def release(self, slot, last, length):
        """A slot's row has ended: the last one, of `length` tokens, takes its place."""
        if slot == last:
            return
        for stored in (*self.keys.values(), *self.values.values()):
            stored[slot, :, :length] = stored[last, :, :length]

    @property
    def bytes_per_position(self):
        """What a position of a slot takes in all layers."""
        num_bytes = sum(stored.nbytes for stored in (*self.keys.values(), *self.values.values()))
        return num_bytes // max(1, self.num_slots * self.num_positions)


class Pages:
    """Pages of PAGE positions, which a slot takes as it grows and gives back when its row has ended.

    A page is one piece of memory, float32: (parts, layers, keys (H, D, PAGE) and values (H, PAGE, D of whole
    vectors)). table_BP: pages of each slot in order, -1 where it has none yet. There are as many as rows can
    fill, but fewer are in use at once: the lowest are taken first, and memory never written takes no room.
    The table is as wide as the longest slot has needed.
    """

    layers = None  # nothing is taken before it is written

    def __init__(self, num_slots, num_positions, num_parts=1, num_layers=1):
        self.num_slots, self.num_layers, self.num_parts = num_slots, num_layers, num_parts
        self.num_positions = whole(num_positions, PAGE)
        self.table_BP = torch.full((num_slots, 0), -1)
        self.num_used, self.free = 0, []  # pages ever taken, and a heap of those given back
        self.memory = None

    def reserve(self, slots, positions):
        longest_B = torch.zeros(self.num_slots, dtype=torch.int64)
        longest_B.scatter_reduce_(0, slots, positions + 1, "amax")
        starts_P = torch.arange(0, int(longest_B.max()), PAGE)
        missing = max(0, len(starts_P) - self.table_BP.shape[1])
        self.table_BP = functional.pad(self.table_BP, (0, missing), value=-1)
        is_needed_BP = starts_P < longest_B[:, None]
        for slot, index in (is_needed_BP & (self.table_BP[:, : len(starts_P)] < 0)).nonzero().tolist():
            self.table_BP[slot, index] = self.take_page()

    def take_page(self):
        if self.free:
            page = heapq.heappop(self.free)
        else:
            page, self.num_used = self.num_used, self.num_used + 1
        if self.memory is not None:
            self.memory[page] = 0
        return page

    def write(self, layer, keys_BHTD, values_BHTD, place):
        if self.memory is None:
            self.allocate(keys_BHTD, values_BHTD)
        slots, parts = place.slots % self.num_slots, place.slots // self.num_slots
        pages, offsets = self.table_BP[slots, place.positions // PAGE], place.positions % PAGE
        self.keys[pages, parts, layer, :, :, offsets] = keys_BHTD[place.rows, :, place.columns].float()
        self.values[pages, parts, layer, :, offsets] = values_BHTD[place.rows, :, place.columns].float()

    def allocate(self, like_BHTD, values_BHTD):
        _, num_heads, _, width = like_BHTD.shape
        padded = whole(values_BHTD.shape[-1], LANES)
        sizes = num_heads * width * PAGE, num_heads * PAGE * padded
        num_pages = self.num_slots * self.num_positions // PAGE
        shape = num_pages, self.num_parts, self.num_layers, sum(sizes)
        self.memory, self.dtype = torch.empty(shape, dtype=torch.float32), like_BHTD.dtype
        self.memory[: self.num_used] = 0
        keys, values = self.memory.split(sizes, dim=-1)
        self.keys = keys.unflatten(-1, (num_heads, width, PAGE))
        self.values = values.unflatten(-1, (num_heads, PAGE, padded))[..., : values_BHTD.shape[-1]]

    def read(self, layer, first, num_rows, length):
        part, first = divmod(first, self.num_slots)
        pages_NP = self.table_BP[first : first + num_rows, : -(-length // PAGE)].clamp(min=0)
        pages = (stored[pages_NP, part, layer] for stored in (self.keys.mT, self.values))
        return tuple(p.transpose(1, 2).flatten(2, 3)[:, :, :length].to(self.dtype) for p in pages)

    def release(self, slot, last, length):
        for page in self.table_BP[slot][self.table_BP[slot] >= 0].tolist():
            heapq.heappush(self.free, page)
        if slot != last:
            self.table_BP[slot] = self.table_BP[last]
        self.table_BP[last] = -1

    @property
    def bytes_per_position(self):
        return 0 if self.memory is None else self.memory[0].nbytes // PAGE


class SlotCache(Cache):
    """What the library's attention layers see of Slots or Pages."""

    num_parts = 1

    def __init__(self, make_storage, num_slots, num_positions):
        super().__init__(layers=[])
        self.storage = make_storage(num_slots, num_positions, num_parts=self.num_parts)
        self.placement = None

    def place(self, placement):
        """Say where the tokens of the next forward pass go."""
        self.storage.reserve(placement.slots, placement.positions)
        self.placement = placement

    def update(self, keys_BHTD, values_BHTD, layer_idx, *args, **kwargs):
        """Store the given tokens and return what attention should see (called by each attention layer)."""
        self.storage.write(layer_idx, keys_BHTD, values_BHTD, self.placement)
        if self.placement.read is None:
            return keys_BHTD, values_BHTD
        return self.storage.read(layer_idx, *self.placement.read)

    def get_seq_length(self, layer_idx=0):
        return 0 if self.placement is None or self.placement.read is None else self.placement.read[2] - 1
