"""A KV cache in pages, which native.c reads (paged attention: Kwon et al., 2023)."""

import heapq

import torch
from torch.nn import functional

from ads.kv_cache import whole

LANES = 16  # floats of a vector
PAGE = 64  # native.c has the same


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

    def strides(self):
        """Fields of native.c's StepStruct: pages of the longest slot, floats from one thing to the next."""
        return {
            "slot_pages": self.table_BP.shape[1],
            "page_stride": self.memory.stride(0),
            "part_stride": self.memory.stride(1),
            "v_stride": self.values.stride(-2),
        }

    @property
    def bytes_per_position(self):
        return 0 if self.memory is None else self.memory[0].nbytes // PAGE
