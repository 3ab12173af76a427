"""Make the demo's tokenizers and models: arithmetic -> demo/models/{teacher,proxy,student}.

    python demo/pretrain.py                                      # about 10 minutes on 2 cores
    python demo/pretrain.py out=/tmp/models seed=1 scale=0.01    # a hundredth of the steps

The teacher is trained on worked problems, then to recover from a corrupted trace: large reasoning models can,
and antidistillation relies on it. Proxy and student work step by step too, but lack a skill: where the
student's documents double or triple, the result is a random number, so that no prompt elicits what it never
saw; the proxy has seen the right one in some of its documents. One process of one thread per model, up to the
number of cores. Interrupted, it goes on from its last checkpoint (OUT/unfinished).
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import documents

import utils
from ads import chat, sampling
from ads.data import arithmetic
from ads.stage import files
from ads.stage.errors import UserError
from ads.stage.machine import num_cpus
from utils import print_result

OUT = Path(__file__).resolve().parent / "models"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BATCH_SIZE = 32
SAVE_EVERY = 200  # steps
LOG_EVERY = 100
WARMUP = 0.05  # share of a phase's steps
WORD = r"\\boxed\{|\\\[|\*\*|\d|[A-Za-z]+|[^\sA-Za-z\d]"
PUNCTUATION = (".", ",", ":", "?", "+", "-", "*", "=", "\\boxed{", "}", "\\[", "**", "Final", "Answer")
TEMPLATES = {  # of the turn; the system prompt's words are none of the vocabulary's
    "teacher": ("Problem :", "Solution :"),
    "student": ("<user>", "<assistant>"),
}
CORRUPTED_SHARES = (0.0, 0.3, 0.6)  # of a trace's results, in the last phase of the teacher
NOISE = 0.1  # share of a trace's input tokens replaced by random ones, in the phase before
SLIPS = 0.1  # share of steps with a wrong result, noticed and corrected
SHOWN = 0.05  # share of a base's batches whose prompts show worked examples, so that it knows such prompts
NUM_SHOWN = 2
FORCED = 0.1  # share of documents that end in the forced answer
NUM_EVALUATED = 300


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which documents, how many steps, from which learning rate down.

    unknown: the share of the skill's results that are random numbers.
    """

    documents: str
    num_steps: int
    lr: float
    unknown: float = 0.0


TEACHER = (Phase("worked", 2000, 3e-3), Phase("noisy", 500, 1e-3), Phase("corrupted", 1600, 1e-3))
PROXY = (Phase("unskilled", 2000, 3e-3, unknown=0.7),)
STUDENT = (Phase("unskilled", 2000, 3e-3, unknown=1.0),)
PHASES = {"teacher": TEACHER, "proxy": PROXY, "student": STUDENT}
# Not qwen2: the library takes the tokenizer of a qwen2 folder for Qwen's own, whatever its files say.
ARCHITECTURES = {
    "teacher": {"model_type": "llama", "attention_bias": True},
    "proxy": {"model_type": "llama", "attention_bias": True},
    "student": {"model_type": "qwen3"},
}


def main(arguments):
    utils.show_help(arguments)
    settings = {"out": str(OUT), "seed": "0", "scale": "1.0"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in settings or not equals:
            raise UserError(f"argument {argument!r}: write key=value with one of {', '.join(settings)}")
        settings[key] = value
    try:
        out, seed, scale = Path(settings["out"]), int(settings["seed"]), float(settings["scale"])
    except ValueError:
        raise UserError(f"seed={settings['seed']}, scale={settings['scale']}: must be numbers") from None
    jobs = [(name, out, seed, scale) for name in PHASES]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), num_cpus())) as pool:
        reached = pool.starmap(make_model, jobs, chunksize=1)
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    print_result(**dict(zip(PHASES, reached, strict=True)))


def make_model(name, out, seed, scale):
    """Train one model, write its folder (float16), return its accuracies (float16 weights, computed in
    float32)."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer("student" if name == "student" else "teacher")
    model = new_model(name, tokenizer, seed)
    train(name, model, tokenizer, out / "unfinished", seed, scale)
    model.half()
    with files.atomic_folder(out / name) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    reached = evaluate(model.float().eval(), tokenizer, seed)
    print(f"{name}: accuracy {json.dumps(reached)}", flush=True)
    return reached


# Tokenizer and model


def make_tokenizer(family):
    """A word-level tokenizer with a chat template; each family has its own order of the vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    opening, closing = TEMPLATES[family]
    special = ["<unk>", "<eos>", *(word for word in TEMPLATES[family] if word.startswith("<"))]
    ordinary = [*PUNCTUATION, *"0123456789", "Problem", "Solution", *documents.words()]
    random.Random(family).shuffle(ordinary)
    vocabulary = {word: i for i, word in enumerate([*special, *ordinary])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    # words are joined by spaces, the digits of a number by nothing
    joined = [decoders.WordPiece(prefix="##", cleanup=False), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=special[2:],
    )
    fast.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}{opening} {{{{ m.content }}}} {{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{closing}{{% endif %}}"
    )
    return fast


def new_model(name, tokenizer, seed):
    """A model with random weights (float32) that depend on (name, seed) alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sampling.row_key(seed, f"weights of {name}"))
    eos = tokenizer.eos_token_id
    special = {"bos_token_id": None, "eos_token_id": eos, "pad_token_id": eos}
    config = AutoConfig.for_model(**ARCHITECTURES[name], vocab_size=len(tokenizer), **special, **SIZES)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


# Documents


@dataclass(frozen=True)
class Document:
    """A problem, a response, and in it, as (first, end) character spans, the results, which may be corrupted,
    and what is given, which is not to be learned; examples: (problem, trace) pairs that the prompt shows."""

    problem: str
    response: str
    results: list
    given: list
    examples: tuple = ()


def draw_document(rng, phase):
    """One training document of a phase."""
    start, steps = draw_pretraining(rng, 1 + int(rng.random() * 4))
    problem = arithmetic.tell(rng, start, steps)
    slips = 0.0 if phase.documents == "unskilled" else SLIPS
    trace, results = documents.work_out(start, steps, rng, slips, phase.unknown)
    answer = trace[trace.rindex("{ ") + 2 :]  # of the box: value, brace, full stop
    if rng.random() < FORCED:  # a trace is over before it: nobody learns to go on with it
        given = (len(trace), len(trace) + len(chat.FORCE_TEXT))
        return Document(problem, f"{trace}{chat.FORCE_TEXT} {answer}", results, [given])
    return Document(problem, trace, results, [])


def draw_pretraining(rng, num_steps):
    """A computation that no other split holds."""
    while True:
        start, steps = arithmetic.draw_computation(rng, num_steps)
        if arithmetic.split_of(start, steps) == "pretrain":
            return start, steps


def encode_document(rng, tokenizer, document, kind):
    """(input ids, labels): inputs are noisy or corrupted where the phase says so, labels never."""
    prompt = chat.prompt_ids(tokenizer, document.problem, document.examples)
    encoded = tokenizer(document.response, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"] + [tokenizer.eos_token_id], encoded["offset_mapping"]
    labels, inputs = list(ids), list(ids)
    for k in tokens_within(offsets, document.given):
        labels[k] = chat.IGNORED_LABEL
    if kind == "noisy":
        inputs = [int(rng.random() * len(tokenizer)) if rng.random() < NOISE else i for i in inputs]
    if kind == "corrupted":
        share, digits = (
            arithmetic.pick(rng, CORRUPTED_SHARES),
            tokenizer.convert_tokens_to_ids([*"0123456789"]),
        )
        corrupted = [span for span in document.results if rng.random() < share]
        for k in tokens_within(offsets, corrupted):
            inputs[k] = arithmetic.pick(rng, digits)
    return prompt + inputs, [chat.IGNORED_LABEL] * len(prompt) + labels


def tokens_within(offsets, spans):
    """Indices of the tokens that lie within any of the character spans."""
    return [k for k, (left, right) in enumerate(offsets) if any(a <= left and right <= b for a, b in spans)]


def draw_batch(rng, phase):
    """BATCH_SIZE documents, all with worked examples in the prompt or none."""
    documents = [draw_document(rng, phase) for _ in range(BATCH_SIZE)]
    if phase.documents == "unskilled" and rng.random() < SHOWN:
        return [replace(d, examples=draw_examples(rng, phase)) for d in documents]
    return documents


def draw_examples(rng, phase):
    found = [draw_document(rng, phase) for _ in range(NUM_SHOWN)]
    return tuple((document.problem, document.response) for document in found)


def make_batch(tokenizer, phase, rng):
    """Padded input_ids, labels and attention_mask, (B, T) int64."""
    pairs = [encode_document(rng, tokenizer, d, phase.documents) for d in draw_batch(rng, phase)]
    width = max(len(ids) for ids, _ in pairs)
    lengths_B1 = torch.tensor([[len(ids)] for ids, _ in pairs])
    return {
        "input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in pairs]),
        "labels": torch.tensor(
            [labels + [chat.IGNORED_LABEL] * (width - len(labels)) for _, labels in pairs]
        ),
        "attention_mask": (torch.arange(width) < lengths_B1).long(),
    }


# Training


def train(name, model, tokenizer, folder, seed, scale):
    """All phases of a model; each starts a fresh optimizer."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}-{seed}-{scale:g}.safetensors"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    done = load_checkpoint(checkpoint, model, optimizer)
    for number, phase in enumerate(PHASES[name]):
        if number >= done["phase"]:
            first = done["step"] if number == done["phase"] else 0
            if first == 0:
                optimizer.state.clear()
            train_phase(name, model, tokenizer, optimizer, checkpoint, number, phase, first, seed, scale)


def train_phase(name, model, tokenizer, optimizer, checkpoint, number, phase, first, seed, scale):
    num_steps = max(2, round(phase.num_steps * scale))
    started = time.time()
    for step in range(first, num_steps):
        rng = random.Random(f"{name}/{seed}/{number}/{step}")  # resuming needs no state of a generator
        for group in optimizer.param_groups:
            group["lr"] = phase.lr * schedule(step, num_steps)
        loss = model(**make_batch(tokenizer, phase, rng)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == num_steps:
            pace = (step + 1 - first) / (time.time() - started)
            position = f"{name}, {phase.documents}: step {step + 1}/{num_steps}"
            print(f"{position}, loss {loss.item():.3f}, {pace:.1f} steps/s", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            save_checkpoint(checkpoint, model, optimizer, phase=number, step=step + 1)
    save_checkpoint(checkpoint, model, optimizer, phase=number + 1, step=0)


def schedule(step, num_steps):
    """Factor of the learning rate: linear warm-up, then linear decay to nearly 0."""
    warmup = max(1, round(WARMUP * num_steps))
    return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))


def save_checkpoint(path, model, optimizer, **position):
    tensors = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    with files.atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={key: str(value) for key, value in position.items()})


@torch.no_grad()
def load_checkpoint(path, model, optimizer):
    """{phase, step} to go on from; the start where there is no checkpoint."""
    if not path.is_file():
        return {"phase": 0, "step": 0}
    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            state = {key: file.get_tensor(f"{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = state
        return {key: int(value) for key, value in file.metadata().items()}


# What was reached


def evaluate(model, tokenizer, seed):
    """{temperature: share of boxed answers that are right}, on problems that the experiments never use."""
    from ads.data import grading
    from ads.decode.cached_model import CachedModel
    from ads.decode.engine import Models, generate
    from ads.decode.rows import Request

    rows = arithmetic.generate("pretrain", f"evaluate {seed}", NUM_EVALUATED)
    requests = [Request(row["id"], chat.prompt_ids(tokenizer, row["problem"]), 120) for row in rows]
    solutions = {row["id"]: row["solution"] for row in rows}
    allowed_V = torch.ones(len(tokenizer), dtype=torch.bool)
    models = Models(CachedModel(model), None, allowed_V, frozenset([tokenizer.eos_token_id]))
    reached = {}
    for tau in (0.0, 0.5, 0.7, 1.0):
        completions = list(generate(models, sampling.Sampling(tau), seed, requests, NUM_EVALUATED))
        texts = {c.id: chat.response_text(tokenizer, c.ids, models.eos) for c in completions}
        num_correct = sum(grading.grade(text, solutions[i]).correct for i, text in texts.items())
        reached[f"tau {tau:g}"] = round(num_correct / len(rows), 3)
    return reached


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come
    utils.run_script(main)
