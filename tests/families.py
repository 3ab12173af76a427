"""Tiny random models of every family of causal language models that the installed transformers has.

A family is a `model_type`. Its configuration is the library's default, shrunk by facts of the configuration
(SIZES, by the names that the library gives to widths and numbers), and what that leaves inconsistent is put
right in OVERRIDES. Windows, chunks and lengths are so small that a few dozen tokens go beyond them.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

VOCABULARY = 272
EOS = 0
MAX_POSITIONS = 256
WINDOW = 40  # beyond the rows that models are tried with at load
MOST_PARAMETERS = 1_000_000
WIDTH, HEADS, KEYS, HEAD_WIDTH, INNER, LAYERS, EXPERTS = 32, 4, 2, 8, 48, 2, 4

# what a number of the configuration is set to, by its name
SIZES = {
    size: value
    for names, value in (
        ("vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input", VOCABULARY),
        ("max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"
         " model_max_length", MAX_POSITIONS),
        ("hidden_size d_model n_embd dim_model emb_dim embedding_dim embedding_size input_embedding_size"
         " output_embedding_size word_embed_proj_dim lru_width attention_hidden_size pronunciation_embed_dim"
         " shape_embed_dim hidden_size_global", WIDTH),
        ("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers"
         " num_encoder_layers num_layers_per_stack num_blocks", LAYERS),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"
         " num_decoder_attention_heads num_encoder_attention_heads attention_heads linear_num_value_heads"
         " linear_num_heads swa_num_attention_heads index_n_heads", HEADS),
        ("num_key_value_heads num_kv_heads linear_num_key_heads swa_num_key_value_heads"
         " num_query_groups", KEYS),
        ("head_dim kv_channels dim_head d_head linear_key_head_dim linear_value_head_dim linear_head_dim"
         " attention_head_size swa_head_dim global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim"
         " index_head_dim d_rel", HEAD_WIDTH),
        ("kv_lora_rank q_lora_rank o_lora_rank hc_lowrank gated_norm_rank laurel_rank adapter_rank"
         " hidden_size_per_layer_input ple_embed_dim router_hidden_size", 8),
        ("intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner"
         " feed_forward_size ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size"
         " shared_experts_intermediate_size expert_ffn_hidden_size intermediate_size_mlp n_inner"
         " dense_intermediate_size moe_shared_expert_intermediate_size", INNER),
        ("num_experts n_routed_experts num_local_experts moe_num_experts", EXPERTS),
        ("num_experts_per_tok num_experts_per_token moe_topk moe_k", 2),
        ("n_group topk_group num_expert_group n_groups mamba_n_groups mamba_ngroups zero_expert_num"
         " n_shared_experts num_shared_experts moe_num_shared_experts", 1),
        ("first_k_dense_replace num_dense_layers moe_layer_start_index num_kv_shared_layers", 1),
        ("state_size mamba_d_state ssm_state_size time_step_rank mamba_dt_rank", 8),
        ("mamba_n_heads mamba_num_heads n_mamba_heads", 4),
        ("mamba_d_head mamba_head_dim mamba_headdim", 16),
        ("mamba_d_ssm", 64),
        ("chunk_size mamba_chunk_size block_size index_block_size", 8),
        ("sliding_window attention_window_size window_size local_attention sliding_window_size"
         " keep_window_size attention_chunk_size index_topk", WINDOW),
        ("index_topk_blocks", 2),
        ("rotary_dim", 4),
        ("query_pre_attn_scalar", HEAD_WIDTH),
        ("pad_token_id bos_token_id eos_token_id", EOS),
        ("is_decoder", True),
    )
    for size in names.split()
}  # fmt: skip
# configuration of parts that are no part of the decoder: gone, or of no interest
PARTS = ("vision_config", "audio_config", "text_encoder", "audio_encoder")
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OVERRIDES = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4}
                                                for kind in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": KEYS, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2,
                            "hidden_size": WIDTH}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1,
              "first_k_dense_replace": 1},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "num_kv_shared_layers": 2, "intermediate_size": INNER,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": {"num_kv_shared_layers": 0, "per_layer_config": {"1": {"head_dim": 16}}},
    "gemma4_unified_text": {"num_kv_shared_layers": 0, "per_layer_config": {"1": {"head_dim": 16}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": HYBRID,
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": HEAD_WIDTH},
    "nemotron": {"num_key_value_heads": KEYS},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 16, "indexer_compress_ratio": 2, "output_gate_type": "sigmoid",
                       "ngram_vocab_size_base": 50},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 3,
               "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
               "hybrid_layer_ids": [1], "attention_hidden_size": 64, "attention_head_dim": 16,
               "num_key_value_heads": HEADS},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": WINDOW}
LONG = {"short_factor": [1.0] * (HEAD_WIDTH // 2), "long_factor": [4.0] * (HEAD_WIDTH // 2)}
# the same family with other settings: "FAMILY what"
VARIANTS = {
    "bert not causal": {"is_decoder": False},
    "falcon ALiBi": {"alibi": True},
    "gpt2 of 48 positions": {"n_positions": 48},
    "llama dynamic": {"max_position_embeddings": WINDOW,
                      "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "llama yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}},
    "ministral3 of scaled queries": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.5, **ROPE}},
    "opt of 48 positions": {"max_position_embeddings": 48},
    "phi3 longrope": {"original_max_position_embeddings": WINDOW,
                      "rope_parameters": {"rope_type": "longrope", **ROPE, **LONG}},
}  # fmt: skip
# one of each kind of difficulty
QUICK = ("bert not causal", "bloom", "deepseek_v2", "gemma", "gpt_neo", "gpt_oss", "gpt2 of 48 positions",
         "llama dynamic", "mamba", "opt", "phi3 longrope")  # fmt: skip


class NotBuildable(Exception):
    """A family that has no tiny model; the text says why."""


def kinds():
    """Every model_type of the library, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def kind_of(name):
    """The model_type of a family or variant."""
    return name.split(" ")[0]


def families():
    """The names of all families and variants."""
    return sorted([*kinds(), *(name for name in VARIANTS if kind_of(name) in kinds())])


def build(name, seed=0, **settings):
    """A tiny random float32 model of a family, in eval mode; `settings` go into its (text) configuration."""
    try:
        config = tiny_config(name, **settings)
        with torch.device("meta"):
            num_parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception as error:  # whatever the library raises for a configuration that does not hold together
        raise NotBuildable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if num_parameters > MOST_PARAMETERS:
        raise NotBuildable(f"{num_parameters} parameters after shrinking")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    spread_(model)
    return model.eval()


@torch.no_grad()
def spread_(model):
    """Weights by which predictions depend on all of the context and are far from uniform."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for p in model.parameters():
        if p.dim() > 1:
            std = 0.3 if id(p) in tables else 1.3 * p.shape[-1] ** -0.5
            torch.nn.init.normal_(p, std=std)


def tiny_config(name, **settings):
    """The shrunk configuration of a family."""
    logging.set_verbosity_error()
    kind = CONFIG_MAPPING[kind_of(name)]
    changed = OVERRIDES.get(kind_of(name), {}) | VARIANTS.get(name, {}) | settings
    shrunk = shrink(kind().to_dict(), changed)
    return kind(**shrunk)


def shrink(default, settings):
    """Keyword arguments of a smaller configuration, of the default one as a dict."""
    found = {key: SIZES[key] for key, value in default.items() if key in SIZES and isinstance(value, int)}
    if "sliding_window" in default:  # where it is off, too
        found["sliding_window"] = WINDOW
        found |= {
            key: value
            for key, value in (("use_sliding_window", True), ("max_window_layers", 1))
            if key in default
        }
    if "kv_lora_rank" in default:  # multi-head latent attention has as many keys as queries
        found["num_key_value_heads"] = HEADS
    kinds = default.get("layer_types")
    if kinds and len(set(kinds)) > 1:  # one layer of each kind
        found["layer_types"] = list(dict.fromkeys(kinds))
        found["num_hidden_layers"] = len(found["layer_types"])
    for key, part in default.items():
        if isinstance(part, dict) and "model_type" in part and key not in PARTS:
            found[key] = shrink(part, OVERRIDES.get(part["model_type"], {})) | {
                "model_type": part["model_type"]
            }
    if isinstance(found.get("text_config"), dict):
        found["text_config"] |= settings
        return found
    return found | settings
