"""Causal language models: loading them whole, their attention on GPUs, and the memory that they take.

Shapes: H heads of queries, T tokens.
"""

import contextlib
import functools
import tempfile

import psutil
import torch
from torch.utils.checkpoint import checkpoint
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from ads.stage import errors, hub
from ads.stage.errors import UserError
from ads.stage.inputs import check_no_adapter

# Of CUDA alone. cuDNN's attention makes a plan for each new shape, in which time other kernels do many steps.
# Sums of a product's parts stay float32: in 16 bits logits would depend more on how kernels cut a product up,
# and so on the number of rows.
torch.backends.cuda.enable_cudnn_sdp(False)
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def load_model(name: str, dtype: str, device, attn_implementation: str = "auto"):
    """The causal language model `name` (folder or hub name), in eval mode; ValueError when that fails.

    dtype "auto" is bfloat16 on CUDA, float32 elsewhere; attention "auto" is the library's choice.
    """
    attention = None if attn_implementation == "auto" else attn_implementation
    check_no_adapter(name)
    where, commit = hub.locate(name, "model")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            revision=commit,
            dtype=resolve_dtype(dtype, device),
            attn_implementation=attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            use_safetensors=True,  # no pickle
        )
    except Exception as error:  # whatever a folder that does not hold together makes the library raise
        raise UserError(f"model {name!r} could not be loaded: {errors.reason(error)}") from error
    check_weights(name, report)
    return model.to(device).eval()


def check_weights(name: str, report: dict):
    """ValueError unless a model folder has all weights in their shapes; the library would make up others.

    report: what the library tells of a load. Weights that the model has no place for are said.
    """
    if wrong := sorted(report["mismatched_keys"]):
        key, stored, wanted = wrong[0]
        raise UserError(
            f"model {name!r}: weights and config.json do not belong together: {key} is {tuple(stored)}, "
            f"by the configuration {tuple(wanted)} ({len(wrong)} weights differ)"
        )
    if missing := sorted(report["missing_keys"]):
        absent = f"{len(missing)} weights missing, such as {missing[0]}"
        raise UserError(f"model {name!r} is not complete: {absent}")
    if unused := sorted(report["unexpected_keys"]):
        useless = f"{len(unused)} weights, such as {unused[0]}"
        print(f"WARNING: model {name!r} has no use for {useless}", flush=True)


def sdpa(module, query, key, value, attention_mask, **others):
    """The library's sdpa attention, with keys repeated where a GPU would else hold a row's whole scores.

    The library leaves it to torch that heads share keys wherever there is no mask. Of torch's kernels on CUDA
    flash attention alone can do that, which takes no float32: (H, T, T) scores of each layer would be kept.
    """
    if query.is_cuda and query.dtype == torch.float32:
        return sdpa_repeated(module, query, key, value, attention_mask, **others)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **others)


def sdpa_repeated(module, query, key, value, attention_mask, is_causal=None, **others):
    """sdpa with a copy of the keys and values for each head of queries, which any kernel takes."""
    num_groups = getattr(module, "num_key_value_groups", 1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    given = torch.nn.Identity(), query, key, value, attention_mask  # a module that has no groups
    return sdpa_attention_forward(*given, is_causal=is_causal, **others)


AttentionInterface.register("sdpa", sdpa)


@contextlib.contextmanager
def recomputed(model, is_on=True):
    """A context in which layers keep no activations for the backward pass, which makes them again.

    The library's own gradient checkpointing works in training mode alone, and that lets in dropout, in
    whatever form and under whatever name a model has it; here mode and gradient stay what they are. Cached
    keys would be written twice: pass use_cache=False. ValueError for a model without layers to recompute.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if is_on else []
    if is_on and not layers:
        kind = model.config.model_type
        raise UserError(f"gradient_checkpointing=true: a {kind!r} model has no layers for it; set false")
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def check_loadable(model):
    """ValueError unless the library can load a model that is saved: it cannot load parts of some."""
    kind = model.config.model_type
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        try:
            is_known = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
        except ValueError:  # of no type that it knows
            is_known = False
    if not is_known:
        raise UserError(f"a {kind!r} model could not be loaded again once saved: choose another student")


def free_bytes(device) -> int:
    """Memory that can still be taken on a device; on the CPU that of the whole machine."""
    if torch.device(device).type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def resolve_dtype(dtype: str, device) -> torch.dtype:
    """The torch dtype of a config's dtype key."""
    if dtype == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return getattr(torch, dtype)


def dtype_name(dtype: str, device) -> str:
    """The same as a config's key names it."""
    return str(resolve_dtype(dtype, device)).removeprefix("torch.")
