"""Pages hold what Slots hold, and take no more room than rows need."""

import pytest
import torch

from ads.cpu.pages import PAGE, Pages
from ads.kv_cache import Placement, Slots

pytestmark = pytest.mark.compiled


def write(storages, layers, slot, first, num_tokens):
    """The same random keys and values of one slot into all storages, values and derivatives."""
    num_slots, parts = storages[0].num_slots, range(storages[0].num_parts)
    positions = torch.arange(first, first + num_tokens)
    columns = torch.arange(num_tokens)
    place = Placement(
        torch.cat([torch.full_like(columns, part) for part in parts]),
        columns.repeat(len(parts)),
        torch.cat([torch.full_like(columns, slot + part * num_slots) for part in parts]),
        positions.repeat(len(parts)),
        None,
    )
    for layer in range(layers):
        given = torch.randn(2, len(parts), 3, num_tokens, 5)
        for storage in storages:
            storage.reserve(torch.full_like(positions, slot), positions)
            storage.write(layer, *given, place)


@pytest.mark.parametrize("num_parts", (1, 2))
def test_pages_hold_what_slots_hold(num_parts):
    """Rows of random lengths come, grow, end and are replaced by the last."""
    generator = torch.Generator().manual_seed(5)
    slots, pages = (
        kind(4, 200, num_parts=num_parts) for kind in (Slots, lambda *a, **k: Pages(*a, num_layers=2, **k))
    )
    lengths = []
    for _ in range(200):
        choice, size = torch.randint(0, 2**30, (2,), generator=generator).tolist()
        if len(lengths) < 4 and choice % 3 == 0:
            lengths.append(0)
            write([slots, pages], 2, len(lengths) - 1, 0, 1 + size % 100)
            lengths[-1] = 1 + size % 100
        elif lengths and choice % 3 == 1:
            slot = size % len(lengths)
            for storage in (slots, pages):
                storage.release(slot, len(lengths) - 1, lengths[-1])
            lengths[slot] = lengths[-1]
            lengths.pop()
        elif lengths and lengths[slot := size % len(lengths)] < 199:
            write([slots, pages], 2, slot, lengths[slot], 1)
            lengths[slot] += 1
        for part in range(num_parts if lengths else 0):
            read = part * 4, len(lengths), max(lengths)
            for wanted, found in zip(slots.read(1, *read), pages.read(1, *read), strict=True):
                for row, length in enumerate(lengths):
                    assert torch.equal(found[row, :, :length], wanted[row, :, :length])
        assert pages.num_used - len(pages.free) == sum(-(-length // PAGE) for length in lengths)


def test_pages_are_used_again_lowest_first():
    pages = Pages(3, 10 * PAGE)
    for slot in range(3):
        write([pages], 1, slot, 0, 2 * PAGE)
    pages.release(0, 2, 2 * PAGE)
    assert pages.table_BP[:2].tolist() == [[4, 5], [2, 3]]
    write([pages], 1, 2, 0, 3 * PAGE)
    assert pages.table_BP[2].tolist() == [0, 1, 6]
    assert pages.num_used == 7
