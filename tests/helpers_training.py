"""What tests of training share: settings, gradients as one vector, families with dropout."""

import torch
from helpers_models import sequences

from ads import chat
from ads.stage.settings import TrainConfig


def flat_gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def examples(num_rows):
    return [
        {"input_ids": s.ids, "labels": [chat.IGNORED_LABEL] * (k := s.num_prompt_tokens) + s.ids[k:]}
        for s in sequences(num_rows)
    ]


def config(tmp_path, **more):
    settings = {"lr": 1e-2, "batch_size": 4, "num_epochs": 2.0, "lora_r": 4, "report_to": "none"}
    return TrainConfig(exp_dir=str(tmp_path), train_traces="t", **{**settings, **more})


LAYERS = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": 0}

SMALL = LAYERS | {"num_attention_heads": 4}

MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8}

# by family; the first four have dropout or noise by default, each in a form of its own
FAMILIES = {
    "opt": SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_bigcode": {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "eos_token_id": 0},
    "seed_oss": SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8},
    "phimoe": SMALL | {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4},
    "mamba": LAYERS | {"state_size": 8},
    "zamba": SMALL
    | MAMBA
    | {"intermediate_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 4, "n_mamba_heads": 2}
    | {"attention_hidden_size": 64, "attention_head_dim": 16}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "openai-gpt": {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "xlnet": {"vocab_size": 264, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
    "trocr": {"vocab_size": 264, "d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 64}
    | {"decoder_attention_heads": 4, "dropout": 0.1},
    "mllama_text_model": SMALL
    | {"intermediate_size": 64, "num_key_value_heads": 2, "cross_attention_layers": [], "pad_token_id": 0},
}


def family(name):
    """A tiny random model in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    if name == "mllama_text_model":
        from transformers import MllamaForCausalLM, MllamaTextConfig

        return MllamaForCausalLM(MllamaTextConfig(**FAMILIES[name])).eval()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **FAMILIES[name]))
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()
