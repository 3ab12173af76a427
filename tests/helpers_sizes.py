"""The sizes of real models, as their config.json have them."""

import functools

from ads.decode import memory_plan

UNTIED = {"vocab_size": 151936, "tie_word_embeddings": False}
TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
# hidden, intermediate, layers, heads, heads of keys, of the models of the paper and of small ones
SHAPES = {
    "R1-Distill-Qwen-7B": ("qwen2", 3584, 18944, 28, 28, 4, {**UNTIED, "vocab_size": 152064}),
    "R1-Distill-Qwen-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, UNTIED),
    "Qwen2.5-3B": ("qwen2", 2048, 11008, 36, 16, 2, TIED),
    "Qwen2.5-0.5B": ("qwen2", 896, 4864, 24, 14, 2, TIED),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, {**TIED, "vocab_size": 128256}),
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, {**TIED, "vocab_size": 128256}),
    "Qwen2.5-1.5B": ("qwen2", 1536, 8960, 28, 12, 2, TIED),
    "SmolLM2-360M": ("llama", 960, 2560, 32, 15, 5, {**TIED, "vocab_size": 49152}),
}
PAPER = "R1-Distill-Qwen-7B", "Qwen2.5-3B", "Llama-3.2-3B"
SMALL = "R1-Distill-Qwen-1.5B", "Qwen2.5-0.5B", "Llama-3.2-1B"
SMALLEST = "Qwen2.5-1.5B", "Qwen2.5-0.5B", "SmolLM2-360M"


@functools.cache
def paper_config(name):
    from transformers import AutoConfig

    kind, hidden, intermediate, layers, heads, keys, more = SHAPES[name]
    return AutoConfig.for_model(
        kind,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=hidden // heads,
        **more,
    )


@functools.cache
def paper_sizes(name):
    return memory_plan.sizes_of(paper_config(name))
