"""Milliseconds per decoding step and peak memory of each way to Delta, beside the same teacher.

    python bench/decode_delta.py MODEL_FOLDER --threads 2 --batch 16

The teacher is the same model without Delta. Prompts are random ids of unequal length and the gradient is
random, neither of which changes the work. The ways take turns in each step, so that what else runs on the
machine hits all alike; medians are printed. Peak memory is that of a process that loads the proxy and
decodes one way: anonymous memory, to which the mapped file of the weights does not count, above what the
imports take; on CUDA what was allocated there.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine

from ads.decode.cached_model import CachedModel
from ads.delta.central import CentralDifference
from ads.delta.exact import ExactDerivative
from ads.dual.factors import Factors, saves_room
from ads.loading import load_model

WAYS = ("plain", "central", "exact_16", "exact_full")


def main():
    args = parse()
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for way in WAYS if args.memory else ():
        with context.Pool(1) as pool:
            peaks[way] = pool.apply(measure_peak, (args, way))
    times = measure_times(args)
    plain, central = times["plain"], times["central"]
    for way in WAYS:
        peak = f"{peaks[way]:8.0f} MB" if peaks else ""
        print(f"{way:12}{times[way]:9.1f} ms{peak}")
    ratios = {
        f"{name}_over_central": {
            "proxy": round(times[name] / central, 3),
            "teacher_and_proxy": round((times[name] + plain) / (central + plain), 3),
        }
        for name in ("exact_16", "exact_full")
    }
    settings = {key: vars(args)[key] for key in ("model", "batch", "threads", "dtype", "device", "steps")}
    print(json.dumps({**settings, "milliseconds": times, "peak_megabytes": peaks, **ratios}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too (Linux)")
    return parser.parse_args()


def make(args, way):
    """What decodes: an object with allocate, prefill and step."""
    models = [load_model(args.model, args.dtype, args.device) for _ in range(2 if way == "central" else 1)]
    model = models[0]
    if way == "plain":
        return CachedModel(model)
    shared_V = torch.ones(model.config.get_text_config().vocab_size, dtype=torch.bool, device=args.device)
    if way == "central":
        for p in (p for m in models for p in m.parameters()):
            p.data += 0.0  # memory of its own, as perturbing gives it
        return CentralDifference(*models, 1e-3, shared_V)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    gradients = {name: random_gradient(shape, 16 * (way == "exact_16")) for name, shape in shapes.items()}
    return ExactDerivative(model, gradients.__getitem__, shared_V)


def random_gradient(shape, rank):
    if saves_room(shape, rank):
        return Factors(0.01 * torch.randn(shape[0], rank), 0.01 * torch.randn(rank, shape[1]))
    return 1e-3 * torch.randn(shape)


@torch.inference_mode()
def start(args, decoder):
    """Prefill; (newest tokens, lengths) of the rows."""
    torch.manual_seed(0)
    prompts = [torch.randint(5, 1000, (60 + 4 * row % 64,)).tolist() for row in range(args.batch)]
    decoder.allocate(args.batch, 128 + args.steps)
    decoder.prefill(prompts, 0)
    device = args.device
    return torch.full((args.batch,), 7, device=device), torch.tensor([len(p) for p in prompts], device=device)


@torch.inference_mode()
def measure_times(args):
    """{way: median milliseconds of a step}."""
    torch.set_num_threads(args.threads)
    decoders = {way: make(args, way) for way in WAYS}
    rows = {way: start(args, decoder) for way, decoder in decoders.items()}
    seconds = {way: [] for way in WAYS}
    for step in range(args.steps):
        for way, decoder in decoders.items():
            tokens_N, lengths_N = rows[way]
            begin = time.perf_counter()
            decoder.step(tokens_N, lengths_N + step, int(lengths_N.max()) + step)
            machine.synchronize(args.device)
            seconds[way].append(time.perf_counter() - begin)
    return {way: round(1e3 * statistics.median(found[2:]), 2) for way, found in seconds.items()}


def measure_peak(args, way):
    """Peak megabytes of this process, which decodes a few steps in one way."""
    torch.set_num_threads(args.threads)
    with machine.AnonymousPeak() as peak:
        decoder = make(args, way)
        tokens_N, lengths_N = start(args, decoder)
        with torch.inference_mode():
            for step in range(3):
                decoder.step(tokens_N, lengths_N + step, int(lengths_N.max()) + step)
    on_cuda = args.device == "cuda"
    return round(machine.peak_megabytes(args.device) if on_cuda else peak.megabytes, 1)


if __name__ == "__main__":
    main()
