"""How much memory of a GPU each stage takes, reckoned from the models' config.json alone.

A plan is a dict of bytes by part: weights, gradient, optimizer, caches, activations, logits. All but the
activations are counted. Those are reckoned from a layer's sizes, as one is built that is like Llama's
(attention that keeps no scores; gate, up and down); a family built otherwise takes more or less there, so a
stage is refused (`check`) for what is counted alone.

Shapes: h hidden, i intermediate, H heads of queries, D head width, V vocabulary.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ads import chat
from ads.data.examples import num_labels, num_tokens
from ads.loading import free_bytes
from ads.stage import errors, hub
from ads.stage.errors import UserError

FLOAT = 4  # bytes
MOMENTS = 8  # of AdamW, per trained weight
NUM_POSITIONS = 64  # of each trace that Delta is judged on
FORCE_IDS = 16  # at most, that close a think block and ask for the answer
# batch_size: auto. More rows than these make a step longer without more tokens per second.
MOST_SLOTS = {"cpu": 64, "cuda": 512}
SLOTS_AT_ONCE = 16  # on CUDA a multiple of this: in 16 bits a trace differs with the number of slots
SHARE_OF_FREE_MEMORY = 0.8  # the rest is for activations of prompts, graphs and what others take
# Log-probabilities, Delta, scores and CDF of a row, per id of the vocabulary, are 30 with top_k and up to 66
# without; those of captured steps have room of their own beside that of prompts' first tokens.
BYTES_PER_LOGIT = 64
# Prompts run through a model in pieces of at most this many tokens, padding included: more take more room.
PREFILL_TOKENS = 16384
GB = 10**9


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a causal language model takes (see `sizes_of`)."""

    parameters: int
    matrices: tuple[tuple[int, int], ...]  # shapes of its parameters of two dimensions
    linears: tuple[tuple[int, int], ...]  # (outputs, inputs) of its linear layers, the last one left out
    cached: int  # numbers in the KV cache per position
    layers: int
    h: int
    i: int
    H: int
    D: int
    V: int

    def factors(self, rank: int) -> int:
        """Numbers in a gradient whose matrices are kept in factors of that rank."""
        if not rank:
            return self.parameters
        saved = (max(0, rows * columns - rank * (rows + columns)) for rows, columns in self.matrices)
        return self.parameters - sum(saved)

    def adapters(self, rank: int) -> int:
        """Weights of LoRA adapters on all linear layers but the last."""
        return sum(rank * (outputs + inputs) for outputs, inputs in self.linears)


def read_sizes(name: str) -> Sizes:
    """The Sizes of a model, a folder or of the hub."""
    where, commit = hub.locate(name, "model")
    try:
        return sizes_of(AutoConfig.from_pretrained(where, revision=commit))
    except Exception as error:  # whatever the library makes of a config.json that does not hold together
        raise UserError(f"model {name!r}: no sizes in its config.json ({errors.reason(error)})") from error


def sizes_of(config) -> Sizes:
    """The Sizes of a model by its configuration: it is built without memory (device meta) and counted."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    text = config.get_text_config(decoder=True)
    heads, hidden = text.num_attention_heads, text.hidden_size
    width = getattr(text, "head_dim", None) or hidden // heads
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=tuple(tuple(p.shape) for p in model.parameters() if p.dim() == 2),
        linears=tuple(tuple(m.weight.shape) for m in layers if m is not model.get_output_embeddings()),
        cached=count_cached(model, width),
        layers=text.num_hidden_layers,
        h=hidden,
        i=getattr(text, "intermediate_size", None) or 4 * hidden,
        H=heads,
        D=width,
        V=model.get_input_embeddings().weight.shape[0],
    )


def count_cached(model, width):
    """Numbers in the KV cache per position, of a model on device meta and its heads' width."""
    ids_1T = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            layers = model(input_ids=ids_1T, use_cache=True).past_key_values.layers
        return sum(layer.keys.numel() + layer.values.numel() for layer in layers) // ids_1T.numel()
    except Exception:  # whatever a family's forward does without numbers: then as most families have it
        text = model.config.get_text_config(decoder=True)
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * width


def itemsize(dtype):
    """Bytes of a number of a config's dtype on a GPU, where "auto" is bfloat16."""
    return FLOAT if dtype == "float32" else 2


def slot_bytes(num_positions, bytes_per_position, num_ids):
    """What a slot takes: its positions in the caches, and its logits over num_ids."""
    return num_positions * bytes_per_position + BYTES_PER_LOGIT * num_ids


def num_slots(free, size, device_type):
    """batch_size: auto, with `free` bytes left by the models and slots of `size` bytes."""
    fitting = max(1, min(MOST_SLOTS[device_type], int(SHARE_OF_FREE_MEMORY * free / size)))
    if device_type == "cuda" and fitting > SLOTS_AT_ONCE:
        fitting -= fitting % SLOTS_AT_ONCE
    return fitting


def decoding(cfg, teacher, proxy, num_slots, num_gradient=0):
    """Sampling num_slots rows at once. cfg: the GenConfig; proxy: its Sizes, or None; num_gradient: numbers
    in its gradient."""
    size, proxy_size = itemsize(cfg.dtype), itemsize(cfg.proxy_dtype)
    weights, position, gradient = size * teacher.parameters, size * teacher.cached, 0
    prompts = prefill(cfg, teacher, num_slots, size)
    if proxy:
        is_dual = cfg.has_delta and not cfg.eps
        weights += (2 if cfg.has_delta and cfg.eps else 1) * proxy_size * proxy.parameters
        gradient = proxy_size * num_gradient if is_dual else 0
        # of two proxies, or of one and its derivatives
        position += (2 if cfg.has_delta else 1) * proxy_size * proxy.cached
        prompts = max(prompts, prefill(cfg, proxy, num_slots, proxy_size, is_dual))
    num_positions = cfg.max_length + (FORCE_IDS + chat.NUM_FORCED_TOKENS if cfg.answer_force else 0)
    logits = num_slots * teacher.V * BYTES_PER_LOGIT
    return {
        "weights": weights,
        "gradient": gradient,
        "caches": num_slots * num_positions * position,
        "activations": max(0, prompts - logits),  # of prompts, which are read before a step's logits come
        "logits": logits,
    }


def prefill(cfg, model, num_slots, size, is_dual=False):
    """What the pass holds that reads most prompts at once, in dual numbers values and derivatives."""
    num_parts = 2 if is_dual else 1
    at_once = PREFILL_TOKENS // num_parts
    num_rows = min(num_slots, max(1, at_once // cfg.max_prompt_length))
    length = min(cfg.max_prompt_length, at_once)
    number = num_rows * length * num_parts * size
    mlp = number * (3 * model.i + 4 * model.h)
    scores = num_rows * model.H * length**2 * (20 + 4 * size) + number * 8 * model.h
    return max(mlp, scores) if is_dual else mlp


def gradient(cfg, proxy, num_tokens, num_logits):
    """The passes over a batch. cfg: the GradConfig; logits are made of the responses' tokens."""
    size = itemsize(cfg.dtype)
    return {
        "weights": (FLOAT + size % FLOAT) * proxy.parameters,  # in 16 bits autocast keeps a copy
        "gradient": FLOAT * proxy.parameters,
        "activations": num_tokens * kept(proxy, size, cfg.gradient_checkpointing),
        "logits": num_logits * proxy.V * (FLOAT * 3 + size % FLOAT),
    }


def distillation(cfg, student, num_tokens, num_logits, num_processes=1):
    """A training step, num_tokens on a device at once. cfg: the TrainConfig."""
    size, rank = itemsize(cfg.dtype), cfg.lora_r if cfg.lora else 0
    frozen, trained = (student.parameters, student.adapters(rank)) if cfg.lora else (0, student.parameters)
    return {
        "weights": size * frozen + (FLOAT + size % FLOAT) * trained,
        "gradient": FLOAT * trained * (2 if num_processes > 1 else 1),  # theirs, and what they send
        "optimizer": MOMENTS * trained,
        "activations": num_tokens * kept(student, size, cfg.gradient_checkpointing, rank),
        "logits": num_logits * student.V * (FLOAT * 3 + size % FLOAT),
    }


def measuring(cfg, student, num_tokens, num_logits, has_gradients):
    """The undistilled student on a batch of traces. cfg: the AttackConfig; has_gradients: that of the holdout
    loss, and another of one trace at a time."""
    size = FLOAT if has_gradients else itemsize(cfg.dtype)
    return {
        "weights": size * student.parameters,
        "gradient": 2 * FLOAT * student.parameters if has_gradients else 0,
        "activations": num_tokens * kept(student, size, False) if has_gradients else 0,
        "logits": num_logits * student.V * FLOAT * 3,
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


def room(device):
    """Bytes that are free on a GPU; None on a CPU, which may swap and is shared with others."""
    if torch.device(device).type != "cuda":
        return None
    gc.collect()  # models of the stage before, in circles
    return free_bytes(device)


def known_sizes(free, *names):
    """The Sizes of models; [] where there is nothing to compare with or a config.json does not tell them:
    whether such a model can be loaded is not for the plan to say."""
    try:
        return [] if free is None else [read_sizes(name) for name in names]
    except ValueError:
        return []


def check(least, plan, free, remedy, advice):
    """ValueError where what is counted of `least` is above `free` bytes, a line where the plan is.

    remedy: what to do about the former, advice: about the latter.
    """
    counted = {name: size for name, size in least.items() if name != "activations"}
    has = f"this GPU has {gigabytes(free)} free, but"
    if peak(counted) > free:
        raise UserError(
            f"{has} {describe(counted)}: {remedy}, or free what others hold of it (docs/memory.md)"
        )
    if peak(plan) > free:
        words = f"{advice} if it runs out of memory (docs/memory.md)"
        print(f"WARNING: {has} by plan {describe(plan)}: {words}", flush=True)


def describe(parts):
    names = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
    return f"{names} are {gigabytes(peak(parts))}"


def gigabytes(size):
    return f"{size / GB:.1f} GB"


def check_decoding(cfg, free):
    """`check` for the models of a GenConfig and one row, before they are loaded; free: see `room`."""
    if not (sizes := known_sizes(free, cfg.teacher, *([cfg.proxy_student] if cfg.has_proxy else []))):
        return
    teacher, proxy = sizes if cfg.has_proxy else (*sizes, None)
    numbers = Path(cfg.grad_path).stat().st_size // FLOAT if cfg.has_delta else 0
    most = 1 if cfg.batch_size == "auto" else cfg.batch_size
    plans = [decoding(cfg, teacher, proxy, num_slots, numbers) for num_slots in (1, most)]
    models = f"teacher={cfg.teacher}" + (f" and proxy_student={cfg.proxy_student}" if proxy else "")
    are_wide = cfg.dtype == "float32" or (proxy and cfg.proxy_dtype == "float32")
    remedy = f"take smaller models than {models}" + (" or 16-bit dtypes" if are_wide else "")
    check(*plans, free, remedy, "set batch_size=auto")


def check_gradient(cfg, sequences, free):
    """The same for the proxy of a GradConfig, its gradient, and the longest of the loss.Sequence list."""
    for proxy in known_sizes(free, cfg.proxy_student):
        longest = max(len(s.ids) for s in sequences)
        num_logits = max(len(s.ids) - s.num_prompt_tokens for s in sequences)
        most = max(cfg.batch_tokens, longest)
        plans = [gradient(cfg, proxy, *pair) for pair in ((longest, num_logits), (most, most))]
        remedy = f"take a smaller model than proxy_student={cfg.proxy_student}"
        check(*plans, free, remedy, "set gradient_checkpointing=true or a lower batch_tokens")


def check_distillation(cfg, examples, free, num_processes):
    """The same for the student of a TrainConfig, what is trained of it, and the longest of the examples."""
    for student in known_sizes(free, cfg.student):
        longest, num_logits = (max(map(count, examples)) for count in (num_tokens, num_labels))
        most = longest * (1 if cfg.per_device_batch_size == "auto" else cfg.per_device_batch_size)
        pairs = (longest, num_logits), (most, most)
        plans = [[distillation(cfg, student, *pair, num_processes) for pair in pairs]]
        if cfg.lora:
            plans.insert(0, [trying_adapters(cfg, student)] * 2)
        words = f"take a smaller model than student={cfg.student}" + ("" if cfg.lora else " or set lora=true")
        for pair in plans:
            check(*pair, free, words, "set gradient_checkpointing=true or per_device_batch_size=1")


def check_measuring(cfg, examples, free, has_gradients):
    """The same for the student of an AttackConfig, and the longest of the examples."""
    for student in known_sizes(free, cfg.student):
        longest, num_logits = (max(map(count, examples)) for count in (num_tokens, num_labels))
        most = max(cfg.batch_tokens, longest)
        plans = [
            measuring(cfg, student, *pair, has_gradients) for pair in ((longest, num_logits), (most, most))
        ]
        remedy = f"take a smaller model than student={cfg.student}"
        check(*plans, free, remedy, "lower batch_tokens or max_length")
