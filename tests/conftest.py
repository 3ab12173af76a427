"""Tiny random models of several architectures, and where optional real data lies."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


def tiny_config(kind, vocab_size):
    from transformers import AutoConfig

    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt_neox":
        return AutoConfig.for_model(
            kind, vocab_size=vocab_size, intermediate_size=64, rotary_pct=0.5, **SIZES, **special
        )
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "gemma3_text":
        window = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
        return AutoConfig.for_model(
            kind, vocab_size=vocab_size, query_pre_attn_scalar=8, final_logit_softcapping=3.0, **window, **sizes, **special
        )
    return AutoConfig.for_model(kind, vocab_size=vocab_size, **sizes, **special)


def tiny_model(kind="qwen2", vocab_size=97, seed=0, spread=0.3):
    """A random float32 model whose next-token distributions are far from uniform."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def shared_path(*parts):
    """A file of the optional real data; skips the test where it is not there."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional real data is not there: {path}")
    return path
