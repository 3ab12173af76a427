"""How much memory of a GPU each stage takes, reckoned from the models' config.json alone.

Weights, gradients, optimizer states and caches are counted; what passes hold on the way is reckoned from a
layer's sizes, as one is built that is like Llama's (attention that keeps no scores; gate, up and down). A
family built otherwise takes more or less there, so a stage is refused (`check`) for what is counted alone.

Sizes are in bytes. Shapes: h hidden, i intermediate, H heads of queries, K of keys, D head width, V vocabulary.
"""

import gc
from dataclasses import dataclass, replace

from ads import chat

FLOAT = 4  # bytes
MOMENTS = 8  # of AdamW, per trained weight
FORCE_IDS = 16  # at most, that close a think block and ask for the answer
BYTES_PER_LOGIT = 64  # of a decoding step: log-probabilities, Delta, scores and CDF of a row
PREFILL_TOKENS = 16384  # prompts run through a model in pieces of at most this many tokens, padding included
RECKONED = ("activations", "prompts")  # what `check` leaves out
GB = 10**9


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a causal language model takes (see `sizes_of`)."""

    name: str
    parameters: int
    matrices: tuple[tuple[int, int], ...]  # shapes of its parameters of two dimensions
    linears: tuple[tuple[int, int], ...]  # (outputs, inputs) of its linear layers, the last one left out
    layers: int
    h: int
    i: int
    H: int
    K: int
    D: int
    V: int

    @property
    def cached(self):
        """Numbers in the KV cache per position."""
        return 2 * self.layers * self.K * self.D

    def factors(self, rank):
        """Numbers in a gradient whose matrices are kept in factors of that rank."""
        if not rank:
            return self.parameters
        whole = sum(rows * columns for rows, columns in self.matrices)
        kept = (min(rank * (rows + columns), rows * columns) for rows, columns in self.matrices)
        return self.parameters - whole + sum(kept)

    def adapters(self, rank):
        """Weights of LoRA adapters on all linear layers but the last."""
        return sum(rank * (outputs + inputs) for outputs, inputs in self.linears)


def read_sizes(name):
    """The Sizes of a model, a folder or of the hub."""
    from transformers import AutoConfig

    from ads import store

    where, commit = store.locate(name, "model")
    return replace(sizes_of(AutoConfig.from_pretrained(where, revision=commit)), name=name)


def sizes_of(config):
    """The Sizes of a model by its configuration: it is built without memory (device meta) and counted."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    shapes = [tuple(m.weight.shape) for m in layers if m is not model.get_output_embeddings()]
    text = config.get_text_config(decoder=True)
    heads, hidden = text.num_attention_heads, text.hidden_size
    return Sizes(
        name=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=tuple(tuple(p.shape) for p in model.parameters() if p.dim() == 2),
        linears=tuple(shapes),
        layers=text.num_hidden_layers,
        h=hidden,
        i=getattr(text, "intermediate_size", None) or 4 * hidden,
        H=heads,
        K=getattr(text, "num_key_value_heads", None) or heads,
        D=getattr(text, "head_dim", None) or hidden // heads,
        V=model.get_input_embeddings().weight.shape[0],
    )


def itemsize(dtype):
    """Bytes of a number of a config's dtype on a GPU, where "auto" is bfloat16."""
    return FLOAT if dtype == "float32" else 2


# Each stage: {what: bytes} on one device


def decoding(cfg, teacher, proxy, num_slots, rank):
    """Sampling num_slots rows at once. cfg: the GenConfig; proxy: its Sizes, or None; rank: of the gradient."""
    size = itemsize(cfg.dtype)
    weights, position, prompts = size * teacher.parameters, size * teacher.cached, prefill(cfg, teacher, size)
    gradient = 0
    if proxy:
        size, num_copies = itemsize(cfg.proxy_dtype), 2 if cfg.eps else 1
        weights += num_copies * size * proxy.parameters
        gradient = 0 if cfg.eps else size * proxy.factors(rank)
        position += 2 * size * proxy.cached  # of two proxies, or of one and its derivatives
        prompts = max(prompts, prefill(cfg, proxy, size, is_dual=not cfg.eps))
    logits = num_slots * teacher.V * BYTES_PER_LOGIT
    caches = num_slots * num_positions(cfg) * position
    # a step's logits come when the prompts are read
    return {"weights": weights, "gradient": gradient, "caches": caches, "logits": logits} | {
        "prompts": max(0, prompts - logits)
    }


def num_positions(cfg):
    """Tokens that a row may come to: those of max_length, and a forced answer."""
    return cfg.max_length + (FORCE_IDS + chat.NUM_FORCED_TOKENS if cfg.answer_force else 0)


def prefill(cfg, model, size, is_dual=False):
    """What the pass holds that reads most prompts at once, in dual numbers values and derivatives."""
    mlp = PREFILL_TOKENS * size * (3 * model.i + 4 * model.h)
    if not is_dual:
        return mlp
    num_rows = PREFILL_TOKENS // 2 // min(cfg.max_prompt_length, PREFILL_TOKENS // 2)
    scores = num_rows * model.H * cfg.max_prompt_length**2
    return max(mlp, scores * (20 + 4 * size) + PREFILL_TOKENS * size * 8 * model.h)


def gradient(cfg, proxy, num_tokens, num_logits):
    """The passes over a batch. cfg: the GradConfig; logits are made of the responses' tokens."""
    size = itemsize(cfg.dtype)
    weights = FLOAT * proxy.parameters
    return {
        "weights": weights + (size * proxy.parameters if size < FLOAT else 0),  # autocast keeps a copy
        "gradient": FLOAT * proxy.parameters,
        "activations": num_tokens * kept(proxy, size, cfg.gradient_checkpointing),
        "logits": num_logits * proxy.V * (FLOAT * 3 + size % FLOAT),
    }


def diagnostics(proxy, num_tokens):
    """What stage 2 takes to judge Delta on traces of up to num_tokens: float32, along the full gradient."""
    scores = proxy.H * num_tokens**2 * 9 * FLOAT
    weights = FLOAT * proxy.parameters
    return {"weights": 2 * weights, "gradient": weights, "activations": scores}


def distillation(cfg, student, num_tokens, num_logits, num_processes=1):
    """A training step, num_tokens on a device at once. cfg: the TrainConfig."""
    size, frozen = itemsize(cfg.dtype), student.parameters if cfg.lora else 0
    trained = student.adapters(cfg.lora_r) if cfg.lora else student.parameters
    casts = size * trained if size < FLOAT else 0
    rank = cfg.lora_r if cfg.lora else 0
    return {
        "weights": size * frozen + FLOAT * trained + casts,
        "gradient": FLOAT * trained * (2 if num_processes > 1 else 1),  # theirs, and what they send
        "optimizer": MOMENTS * trained,
        "activations": num_tokens * kept(student, size, cfg.gradient_checkpointing, rank),
        "logits": num_logits * student.V * (FLOAT * 3 + size % FLOAT),
    }


def trying_adapters(cfg, student):
    """Before training: adapters are tried out, in float32, beside the student as it was loaded."""
    weights = itemsize(cfg.dtype) * student.parameters
    return {"weights": weights + FLOAT * (student.parameters + 2 * student.adapters(cfg.lora_r))}


def kept(model, size, is_recomputed, rank=0):
    """Bytes a token that autograd keeps for the backward pass; rank: of adapters, 0 where all is trained.

    Of a layer: inputs of norms and products, queries, keys and values for each head of queries, what is
    attended to, and the three of the gate. In 16 bits norms are float32, and each product with a weight that
    is trained keeps a copy of its input.
    """
    h, i, heads = model.h, model.i, model.H * model.D
    if size == FLOAT:
        layer = 16 * (h if rank else 1.5 * h) + 16 * heads + 16 * i
    else:
        layer = (18 * h + 10 * heads if rank else 26 * h + 8 * heads) + 8 * i
    layer += size * rank * len(model.linears) / model.layers
    if is_recomputed:  # a layer's input, and what one of them makes again
        return int(model.layers * h * (size if rank else FLOAT) + layer)
    return int(model.layers * layer)


def peak(parts):
    return sum(parts.values())


# What the stages ask


def room(device):
    """Bytes that are free on a GPU; None on a CPU, which may swap, and where others' memory comes and goes."""
    import torch

    from ads.models import free_bytes

    if torch.device(device).type != "cuda":
        return None
    gc.collect()  # models of the stage before, in circles
    return free_bytes(device)


def check(parts, free, remedy):
    """ValueError where what is counted does not fit into `free` bytes (None: not known), a warning where
    the plan's peak does not."""
    if free is None:
        return
    counted = {name: size for name, size in parts.items() if name not in RECKONED}
    if sum(counted.values()) > free:
        raise ValueError(
            f"not enough memory: {describe(counted)} are {gigabytes(peak(counted))}, but "
            f"{gigabytes(free)} are free on this GPU: {remedy} (docs/memory.md)"
        )
    if peak(parts) > free:
        print(
            f"WARNING: this stage is reckoned to take up to {gigabytes(peak(parts))} ({describe(parts)}), but "
            f"{gigabytes(free)} are free on this GPU: {remedy} (docs/memory.md)",
            flush=True,
        )


def describe(parts):
    return ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)


def gigabytes(size):
    return f"{size / GB:.1f} GB"
