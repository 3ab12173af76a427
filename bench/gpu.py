"""What a GPU does with each stage, on random weights of the paper's sizes: see gpu.sh, which runs this.

Traces with and without ADS through ads.engine, and the peer's way, transformers' generate() with a logits
processor that runs two perturbed proxies (bench/decode.py); a decoding step beside its floor, plain and as a
captured graph; the proxy gradient; distillation; and the peak memory of each beside what
ads/decode/memory_plan.py reckons. Prompts are random ids and responses as long as GSM8K's (assumed: log-
normal, median 300), the same for all. On a small model in float32 all four ways of sampling must write the
same traces.

Each section is a process of its own with a limit of time; what fails is a row that says why. The last line is
JSON.
"""

import argparse
import contextlib
import functools
import gc
import io
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import decode
import floor
import machine
from decode_delta import random_gradient

import utils
from ads import sampling
from ads.decode import engine, memory_plan
from ads.decode.cached_model import CachedModel
from ads.decode.rows import Request
from ads.delta import gradient
from ads.delta.central import CentralDifference, perturb_
from ads.delta.exact import ExactDerivative
from ads.delta.loss import Sequence, make_batches
from ads.stage.machine import num_gpus
from ads.stage.settings import GenConfig, GradConfig, TrainConfig
from ads.stage.world import World

RANK, EPS, LAM = 16, 1e-3, 0.03
SMALL_EPS, SMALL_LAM = 1e-2, 10.0  # by which a small model's traces change, in float32 without much noise


@dataclass(frozen=True)
class Scale:
    """How large all is: models (floor.Shape), rows decoded at once and in all, tokens of prompts and rows."""

    teacher: floor.Shape
    proxy: floor.Shape
    student: floor.Shape
    batch: int
    num_rows: int
    prompt: int
    max_length: int
    num_traces: int  # of gradient and distillation
    context: int  # tokens before the steps that are timed: all of them read the same multiple of 128
    steps: tuple[int, int]  # tokens of a short and of a long run, whose difference is that of so many steps
    lora_r: int


SMALL = floor.Shape(2, 64, 128, 4, 2, 16, 512, True)
PAPER = Scale(floor.TEACHER, floor.PROXY, floor.STUDENT, 192, 384, 150, 1024, 128, 260, (16, 96), 128)
TINY = Scale(SMALL, SMALL, SMALL, 4, 8, 8, 40, 4, 8, (4, 36), 4)
FIGURES = ("tokens_per_second", "ms_per_step", "floor_ms", "peak_gb", "plan_gb", "seconds")


def main(arguments):
    args = parse(arguments)
    is_tiny = args.tiny
    device = "cuda" if not is_tiny and num_gpus() else "cpu"
    if device == "cpu" and not is_tiny:
        sys.exit("error: no CUDA device: bash bench/gpu.sh --tiny runs the same on a CPU with tiny models")
    rows, scale = {}, TINY if is_tiny else PAPER
    for measure, minutes in SECTIONS.items():
        if args.only and measure.__name__.removeprefix("measure_") not in args.only:
            continue
        for name, found in run_section(measure, scale, device, 60 * minutes):
            rows[name] = found
            print(name, found, file=sys.stderr, flush=True)
    print(*table(rows), *([] if is_tiny else conclusions(rows)), sep="\n")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"torch": torch.__version__, "transformers": __import__("transformers").__version__}
    print(json.dumps({"device": name, "tiny": is_tiny, **versions, "rows": rows}))
    sys.exit(any("failed" in found for found in rows.values()))


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    names = [measure.__name__.removeprefix("measure_") for measure in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, help="these sections alone")
    return parser.parse_args(arguments)


def run_section(measure, scale, device, seconds):
    """Yield (name, figures) as a process of its own finds them; the last says why it failed, if it did."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(measure, scale, device, theirs))
    process.start()
    theirs.close()
    deadline, name = time.monotonic() + seconds, measure.__name__.removeprefix("measure_")
    try:
        while ours.poll(max(0, deadline - time.monotonic())):
            found = ours.recv()
            if found is None:
                return
            yield found
        yield name, {"failed": f"not done after {seconds} s"}
    except EOFError:  # it ended without a word
        process.join()
        yield name, {"failed": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def work(measure, scale, device, connection):
    """A section's process: sends each (name, figures), then None."""
    sys.stdout = sys.stderr
    utils.quiet_libraries()
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)  # more of them would wait for one another, for models so small
    try:
        for found in measure(scale, device):
            connection.send(found)
    except Exception as error:  # whatever a GPU may bring up; the other sections go on
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        connection.send((measure.__name__.removeprefix("measure_"), {"failed": reason}))
    connection.send(None)


def measure_equal(scale, device):
    """Shares of rows that are the peer's to the token: a small model, float32, greedy."""
    prompts, limits = draw_rows(8, 6, 40)
    args = SimpleNamespace(batch=4, max_length=64, lam=SMALL_LAM, eps=SMALL_EPS, device=device)
    teacher, plus, minus, whole = (make(SMALL, "qwen2", "float32", device) for _ in range(4))
    for model in (minus, whole):
        model.load_state_dict(plus.state_dict())
    read_gradient = draw_gradient(plus)
    perturb_(plus, minus, read_gradient, SMALL_EPS)
    peers = {"plain": decode.Peer(), "ADS": decode.PeerDelta((plus, minus), SMALL_EPS, args.lam)}
    wanted = {k: decode.decode_peer(teacher, p, args, prompts, {0}, limits)[0] for k, p in peers.items()}
    cached, ids_V = CachedModel(teacher), torch.ones(SMALL.vocabulary, dtype=torch.bool, device=device)
    deltas = {
        "plain": None,
        "ADS": CentralDifference(plus, minus, SMALL_EPS, ids_V),
        "ADS, exact": ExactDerivative(whole, read_gradient, ids_V),
    }
    shares = {"ADS is plain": decode.share_equal(wanted["plain"], wanted["ADS"])}
    for name, delta in deltas.items():
        found = decode.decode_ours(teacher, cached, delta, ids_V, args, prompts, {0}, limits)[0]
        shares[name] = decode.share_equal(found, wanted[name.split(",")[0]])
    yield "equal to the peer's", shares


def measure_ours(scale, device):
    for name in ("plain", "ADS"):
        prompts, limits, args = rows_and_settings(scale, device)
        teacher, delta, ids_V, plan = make_ours(scale, device, name == "ADS")
        cached = CachedModel(teacher)
        call = functools.partial(
            decode.decode_ours, teacher, cached, delta, ids_V, args, prompts, {0}, limits
        )
        yield f"traces, {name}", measure_decoding(call, device) | {"plan_gb": in_gb(plan)}
        forget(device)
        call = functools.partial(call, cuda_graph=True)
        yield f"traces, {name}, captured", measure_decoding(call, device) | {"plan_gb": in_gb(plan)}
        del teacher, delta, cached, call
        forget(device)


def measure_peer(scale, device):
    for name in ("plain", "ADS"):
        prompts, limits, args = rows_and_settings(scale, device)
        teacher, peer = make(scale.teacher, "qwen2", dtype_on(device), device), decode.Peer()
        if name == "ADS":
            pair = [make(scale.proxy, "qwen2", dtype_on(device), device) for _ in range(2)]
            perturb_(*pair, draw_gradient(pair[0]), EPS)
            peer = decode.PeerDelta(pair, EPS, LAM)
        call = functools.partial(decode.decode_peer, teacher, peer, args, prompts, {0}, limits)
        yield f"the peer's traces, {name}", measure_decoding(call, device)
        del teacher, peer, call
        forget(device)


def measure_step_with_peer(scale, device):
    """ADS both ways on one batch whose rows all are as long: what the peer's stragglers cost is left out."""
    prompts, _, args = rows_and_settings(scale, device)
    prompts = dict(list(prompts.items())[: scale.batch])
    limits = dict.fromkeys(prompts, scale.steps[1])
    teacher, delta, ids_V, _ = make_ours(scale, device, True)
    cached = CachedModel(teacher)
    call = functools.partial(decode.decode_ours, teacher, cached, delta, ids_V, args, prompts, {0}, limits)
    yield "one batch, ADS", measure_decoding(call, device)
    call = functools.partial(call, cuda_graph=True)
    yield "one batch, ADS, captured", measure_decoding(call, device)
    del delta, cached, call
    forget(device)
    pair = [make(scale.proxy, "qwen2", dtype_on(device), device) for _ in range(2)]
    perturb_(*pair, draw_gradient(pair[0]), EPS)
    call = functools.partial(
        decode.decode_peer, teacher, decode.PeerDelta(pair, EPS, LAM), args, prompts, {0}, limits
    )
    yield "the peer's one batch, ADS", measure_decoding(call, device)


def measure_steps(scale, device):
    """Steps in the middle of the rows, as the difference between a long run and a short one."""
    size = 8192 if device == "cuda" else 512
    rates = machine.bandwidth(device), machine.rate(getattr(torch, dtype_on(device)), device, size)
    speed = SimpleNamespace(bytes=memory_plan.itemsize(dtype_on(device)), bandwidth=rates[0], rate=rates[1])
    context = scale.context + sum(scale.steps) // 2
    for name in ("plain", "ADS"):
        teacher, delta, ids_V, _ = make_ours(scale, device, name == "ADS")
        ours = engine.Models(CachedModel(teacher), delta, ids_V, frozenset())
        shapes = [(scale.teacher, 1), (scale.proxy, 2)][: 2 if delta else 1]
        least = floor.step_seconds(speed, shapes, scale.batch, context)
        for graph in (False, True):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                seconds = step_seconds(ours, scale, graph, device)
            figures = {"ms_per_step": 1e3 * seconds, "floor_ms": 1e3 * least, "of_floor": seconds / least}
            yield f"step, {name}{', captured' if graph else ''}", figures | note_of(said)
        del teacher, delta, ours
        forget(device)


def step_seconds(ours, scale, graph, device):
    seconds = []
    for num_new in (scale.steps[1], *scale.steps):  # the first run warms up, and tries the length
        requests = [Request(str(k), draw_ids(k, scale.context), num_new) for k in range(scale.batch)]
        rule = sampling.Sampling(0.6, LAM if ours.proxy else 0.0, 50, 0.95)
        start = now(device)
        list(engine.generate(ours, rule, 0, requests, scale.batch, cuda_graph=graph))
        seconds.append(now(device) - start)
    return (seconds[2] - seconds[1]) / (scale.steps[1] - scale.steps[0])


def measure_gradient(scale, device):
    for dtype in ("float32", "bfloat16"):
        model, cfg = make(scale.proxy, "qwen2", "float32", device), GradConfig(dtype=dtype)
        sequences = draw_sequences(scale)
        batches = make_batches(sequences, cfg.batch_size, cfg.batch_tokens)
        plan = largest(
            functools.partial(memory_plan.gradient, cfg, memory_plan.sizes_of(model.config)), batches
        )
        add = functools.partial(gradient.add_gradient_, model, batch_size=cfg.batch_size, dtype=dtype)
        add(batches[0], len(batches[0]), batch_tokens=cfg.batch_tokens)
        start = now(device)
        add(sequences, len(sequences), batch_tokens=cfg.batch_tokens)
        yield f"gradient, {dtype}", training_figures(sequences, now(device) - start, device, plan)
        del model, add
        forget(device)


def measure_distillation(scale, device):
    """As distill.py trains, loading and saving left out."""
    from ads import adapters
    from ads.attacks import training
    from ads.data.examples import order_examples

    sequences, world = draw_sequences(scale), World(0, 1, device)
    longest = max(len(s.ids) for s in sequences)
    by_ids = {tuple(s.ids): s for s in sequences}
    examples = [
        {"input_ids": s.ids, "labels": [-100] * s.num_prompt_tokens + s.ids[s.num_prompt_tokens :]}
        for s in sequences
    ]
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            exp_dir=folder, lora_r=scale.lora_r, num_epochs=1.0, save_epochs=10.0, do_eval=False
        )
        student = make(scale.student, "llama", dtype_on(device), device)
        sizes, model = memory_plan.sizes_of(student.config), adapters.add_adapters(student, cfg)
        forget(device)
        most = training.most_per_device(cfg, model, longest, world)
        size = training.per_device_batch(cfg.batch_size, most, 1)
        pad = SimpleNamespace(eos_token_id=0)
        trainer = training.make_trainer(cfg, model, pad, examples, None, size, world)
        start = now(device)
        training.train_fast(trainer)
        seconds = now(device) - start
        rows = [by_ids.get(tuple(e["input_ids"])) for e in order_examples(cfg, examples)]
        batches = [list(filter(None, rows[k : k + size])) for k in range(0, len(rows), size)]
        plan = largest(functools.partial(memory_plan.distillation, cfg, sizes), batches)
        yield "distillation", training_figures(sequences, seconds, device, plan)


# What the sections share


def make(shape, kind, dtype, device):
    """A model of a floor.Shape with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.keys,
        head_dim=shape.width,
        tie_word_embeddings=shape.is_tied,
        initializer_range=shape.hidden**-0.5,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def make_ours(scale, device, is_ads):
    """(teacher, Delta or None, mask of ids, plan)."""
    delta, sizes = None, None
    ids_V = torch.ones(scale.proxy.vocabulary, dtype=torch.bool, device=device)
    if is_ads:
        model = make(scale.proxy, "qwen2", dtype_on(device), device)
        sizes = memory_plan.sizes_of(model.config)
        delta = ExactDerivative(model, draw_gradient(model), ids_V)
    teacher = make(scale.teacher, "qwen2", dtype_on(device), device)
    cfg = GenConfig(
        max_length=scale.max_length,
        max_prompt_length=scale.prompt,
        answer_force=False,
        lam=LAM if is_ads else 0.0,
    )
    numbers = sizes.factors(RANK) if sizes else 0
    plan = memory_plan.decoding(cfg, memory_plan.sizes_of(teacher.config), sizes, scale.batch, numbers)
    return teacher, delta, ids_V, plan


def draw_gradient(model):
    """read_gradient(name) of a random gradient in factors."""
    torch.manual_seed(1)
    drawn = {name: random_gradient(p.shape, RANK) for name, p in model.named_parameters()}
    return drawn.__getitem__


def draw_ids(seed, number):
    rng = random.Random(seed)
    return [rng.randrange(1, 500) for _ in range(number)]


def draw_rows(num_rows, prompt, max_length):
    """({id: prompt}, {id: tokens of the response}): prompts of half to all of `prompt` tokens."""
    generator, prompts, limits = random.Random(0), {}, {}
    for k in range(num_rows):
        prompts[str(k)] = draw_ids(k, generator.randint(prompt // 2, prompt))
        response = generator.lognormvariate(math.log(0.3 * max_length), 0.5)
        limits[str(k)] = min(max_length - prompt, max(2, round(response)))
    return prompts, limits


def draw_sequences(scale):
    prompts, limits = draw_rows(scale.num_traces, scale.prompt, scale.max_length)
    return [Sequence(ids + draw_ids(i, limits[i]), len(ids)) for i, ids in prompts.items()]


def largest(plan, batches):
    """plan(tokens, logits) of the batch of gradient.Sequences, padded to the longest, that takes most."""
    plans = []
    for batch in filter(None, batches):
        width, prompt = max(len(s.ids) for s in batch), min(s.num_prompt_tokens for s in batch)
        plans.append(plan(len(batch) * width, len(batch) * (width - prompt)))
    return max(plans, key=memory_plan.peak)


def rows_and_settings(scale, device):
    prompts, limits = draw_rows(scale.num_rows, scale.prompt, scale.max_length)
    args = SimpleNamespace(batch=scale.batch, max_length=scale.max_length, lam=LAM, eps=EPS, device=device)
    return prompts, limits, args


def measure_decoding(call, device):
    """Figures of what gives ({id: trace}, steps)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = now(device)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        traces, steps = call()
    seconds = now(device) - start
    return note_of(said) | {
        "tokens_per_second": sum(map(len, traces.values())) / seconds,
        "ms_per_step": 1e3 * statistics.median(step.seconds for step in steps),
        "seconds": seconds,
        **peak_gb(device),
    }


def note_of(said):
    """{"note": why steps were not captured}, where that was said."""
    notes = said.getvalue().strip()
    return {"note": notes.splitlines()[0]} if notes else {}


def training_figures(sequences, seconds, device, plan):
    tokens = sum(len(s.ids) for s in sequences)
    found = {"tokens_per_second": tokens / seconds, "seconds": seconds}
    return found | peak_gb(device) | {"plan_gb": in_gb(plan)}


def peak_gb(device):
    return {"peak_gb": torch.cuda.max_memory_allocated() / memory_plan.GB} if device == "cuda" else {}


def in_gb(plan):
    return memory_plan.peak(plan) / memory_plan.GB


def forget(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def now(device):
    machine.synchronize(device)
    return time.perf_counter()


def dtype_on(device):
    return "bfloat16" if device == "cuda" else "float32"


def table(rows):
    width = max(map(len, rows)) + 2
    yield " " * width + "".join(f"{name.removesuffix('_gb').replace('_', ' '):>18}" for name in FIGURES)
    for name, found in rows.items():
        cells = "".join(f"{found[key]:18.2f}" if key in found else f"{'-':>18}" for key in FIGURES)
        rest = ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k}: {v}"
            for k, v in found.items()
            if k not in FIGURES
        )
        yield f"{name:{width}}{cells}  {rest}"


def conclusions(rows):
    """The comparisons that the figures are for, of those that were measured."""
    ways = [
        f"{way}{how}"
        for way in ("traces, ADS", "one batch, ADS", "traces, plain")
        for how in ("", ", captured")
    ]
    pairs = [
        (f"{way}: useful tokens per second over the peer's", "tokens_per_second", way, f"the peer's {way}")
        for way in ways
    ]
    pairs.append(("a step over a captured one, ADS", "ms_per_step", "step, ADS", "step, ADS, captured"))
    for title, key, a, b in pairs:
        b = b if b in rows else b.removesuffix(", captured")
        found = rows.get(a, {}), rows.get(b, {})
        if all(key in row and "note" not in row for row in found):  # what was not captured is not compared
            yield f"{title}: {found[0][key] / found[1][key]:.2f}"


# the minutes that each may take
SECTIONS = {
    measure_equal: 1.5,
    measure_ours: 6,
    measure_step_with_peer: 2,
    measure_peer: 12,
    measure_steps: 3,
    measure_gradient: 2.5,
    measure_distillation: 3,
}

if __name__ == "__main__":
    utils.run_script(main)
