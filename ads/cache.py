"""A KV cache that has a write position per row.

A slot is one row of the batch. Active slots are always 0..n-1, so that reading them is a view, not a copy:

    keys of one layer        position 0 ......................... S-1
    slot 0 (active)          [ prompt | response | next> |   free   ]
    slot 1 (active)          [ prompt | resp | next> |              ]
    slot 2 (released)        [                                      ]

Shapes: B rows given, T tokens given, N rows read, S positions allocated, L positions read, H heads, D head
width.
"""

from dataclasses import dataclass

import torch
from transformers import Cache

LANES = 16  # floats of a vector


@dataclass
class Placement:
    """Where the tokens of one forward pass go: token (row, column) is written to (slot, position)."""

    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    # (first slot, N, L) to attend to after writing; None: attend to the tokens given (a prompt's first chunk)
    read: tuple[int, int, int] | None


def whole_vectors(size):
    return -(-size // LANES) * LANES


class SlotCache(Cache):
    """Keys and values (B, H, S, D) per layer, allocated once at the first prefill, written in place.

    by_columns: keys lie in memory as (B, H, D, S), in which a CPU multiplies queries with them faster; S, and
    D of the values, are padded to whole vectors (native.c counts on it).
    """

    def __init__(self, num_slots, num_positions, by_columns=False):
        super().__init__(layers=[])
        self.num_slots = self.num_values = num_slots
        self.by_columns = by_columns
        self.num_positions = whole_vectors(num_positions) if by_columns else num_positions
        self.keys, self.values = {}, {}
        self.placement = None

    def update(self, keys_BHTD, values_BHTD, layer_idx, *args, **kwargs):
        """Store the given tokens and return what attention should see (called by each attention layer)."""
        if layer_idx not in self.keys:
            self.keys[layer_idx] = self.allocate(keys_BHTD, self.by_columns)
            self.values[layer_idx] = self.allocate(values_BHTD, False)
        place = self.placement
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys[place.slots, :, place.positions] = keys_BHTD[place.rows, :, place.columns]
        values[place.slots, :, place.positions] = values_BHTD[place.rows, :, place.columns]
        if place.read is None:
            return keys_BHTD, values_BHTD
        first, num_rows, length = place.read
        slots = slice(first, first + num_rows)
        return keys[slots, :, :length], values[slots, :, :length]

    def allocate(self, like_BHTD, by_columns):
        _, num_heads, _, width = like_BHTD.shape
        shape = self.num_slots, num_heads, self.num_positions, width
        if by_columns:
            return like_BHTD.new_zeros(*shape[:2], width, self.num_positions).mT
        padded = whole_vectors(width) if self.by_columns else width
        return like_BHTD.new_zeros(*shape[:3], padded)[..., :width]

    @property
    def bytes_per_position(self):
        """What a position of a slot takes in all layers."""
        tensors = [*self.keys.values(), *self.values.values()]
        num_bytes = sum(t.untyped_storage().nbytes() for t in tensors)
        return num_bytes // max(1, self.num_slots * self.num_positions)

    def move(self, source, target, length):
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[target, :, :length] = tensor[source, :, :length]

    def get_seq_length(self, layer_idx=0):
        return 0 if self.placement is None or self.placement.read is None else self.placement.read[2] - 1
