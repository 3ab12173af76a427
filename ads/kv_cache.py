"""A KV cache that has a write position per row.

A slot holds one row of the batch. Slots keeps each slot's positions together, which attention reads as views:

    keys of one layer     position 0 ......................... S-1
    slot 0                [ prompt | response | next> |   free   ]
    slot 1                [ prompt | resp | next> |              ]
    slot 2 (released)     [                                      ]

cpu/pages.py, which native.c reads, gives a slot room as it grows (paged attention: Kwon et al., 2023).

Shapes: B rows and T tokens given; N rows, L positions read; S positions of a slot, H heads, D head width.
"""

from dataclasses import dataclass

import torch
from transformers import Cache


@dataclass
class Placement:
    """Where the tokens of one forward pass go: token (row, column) is written to (slot, position)."""

    rows: torch.Tensor
    columns: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    # (first slot, N, L) to attend to after writing; None: to the tokens given, where nothing is cached yet
    read: tuple[int, int, int] | None


def whole(size, piece):
    """The size rounded up to whole pieces."""
    return -(-size // piece) * piece


class Slots:
    """Keys and values (B, H, S, parts, D) per layer, allocated once, written in place.

    num_parts: 2 in dual numbers. Then a position has derivatives and after them values, so that one product
    reads both (llama_step.attend_dual); a Placement calls the derivatives of slot i slot num_slots + i.
    layers: `layers` of an earlier cache of the model. Without, room is made at the first write, between a
    prompt's activations: on a GPU what these leave behind is too small for the next layer's keys.
    """

    def __init__(self, num_slots, num_positions, num_parts=1, layers=None):
        self.num_slots, self.num_positions, self.num_parts = num_slots, num_positions, num_parts
        self.keys, self.values = {}, {}
        for layer, like in (layers or {}).items():
            self.make_room(layer, *like)

    @property
    def layers(self):
        """{layer: (keys, values)} without slots or positions: heads, width, dtype and device alone."""
        return {
            layer: tuple(stored[layer][:0, :, :0, 0].clone() for stored in (self.keys, self.values))
            for layer in self.keys
        }

    def reserve(self, slots, positions):
        """Have room for slots (B,) up to these positions (B,): there always is, other than in pages."""

    def write(self, layer, keys_BHTD, values_BHTD, place):
        if layer not in self.keys:
            self.make_room(layer, keys_BHTD, values_BHTD)
        slots, parts = place.slots % self.num_slots, -1 - place.slots // self.num_slots
        for stored, given in ((self.keys[layer], keys_BHTD), (self.values[layer], values_BHTD)):
            stored[slots, :, place.positions, parts] = given[place.rows, :, place.columns]

    def make_room(self, layer, keys_BHTD, values_BHTD):
        """Keys and values of a layer, of the heads, widths and dtype of those given."""
        for stored, given in ((self.keys, keys_BHTD), (self.values, values_BHTD)):
            sizes = self.num_slots, given.shape[1], self.num_positions, self.num_parts, given.shape[3]
            stored[layer] = given.new_zeros(sizes)

    def read(self, layer, first, num_rows, length):
        """Keys and values (N, H, L, D) of slots first, first + 1, ..."""
        part, first = divmod(first, self.num_slots)
        stored = self.keys[layer], self.values[layer]
        return tuple(x[first : first + num_rows, :, :length, -1 - part] for x in stored)

    def release(self, slot, last, length):
        """A slot's row has ended: the row of slot `last`, of `length` tokens, takes the slot over."""
        if slot != last:
            for stored in (*self.keys.values(), *self.values.values()):
                stored[slot, :, :length] = stored[last, :, :length]

    @property
    def bytes_per_position(self):
        """What a position of a slot takes in all layers."""
        num_bytes = sum(stored.nbytes for stored in (*self.keys.values(), *self.values.values()))
        return num_bytes // max(1, self.num_slots * self.num_positions)


class SlotCache(Cache):
    """What the library's attention layers see of Slots or Pages; make_storage makes those."""

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
