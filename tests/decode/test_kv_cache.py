"""The cache of slots; that pages hold the same is tests/cpu/test_pages.py."""

from conftest import tiny_model

from ads.decode.cached_model import CachedModel


def test_room_for_keys_and_values_is_made_before_the_first_prompt(without_compiled_code):
    """Made layer by layer between a prompt's activations, on a GPU it did not fit: what these left behind
    when they were freed was too small for the next layer's keys."""
    cached = CachedModel(tiny_model("gemma3_text"))  # two widths of layers would be seen here
    cached.allocate(3, 40)
    storage = cached.cache.storage
    kept = {layer: (storage.keys[layer], storage.values[layer]) for layer in storage.keys}
    assert len(kept) == cached.model.config.num_hidden_layers
    assert storage.bytes_per_position == cached.bytes_per_position
    cached.prefill([[7, 8, 9], [10, 11]], 0)
    assert storage.keys.keys() == kept.keys()
    for layer, (keys, values) in kept.items():
        assert storage.keys[layer] is keys and storage.values[layer] is values and keys[0, :, 2].any()
