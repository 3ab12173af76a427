"""One decoding step beside the linear layers it consists of and the cache it reads.

    python bench/step.py models/smollm2 --batch 16 32 64 --context 300 --threads 2

Rows: the teacher alone, and the exact derivative (rank 16) of the same model. `products` is the time of the
step's own linear layers, run one after the other on inputs of the right shape; `cache` what reading keys and
values takes at the measured bandwidth. Random prompts and a random gradient, neither of which changes the
work. Step and products take turns, so that what else runs on the machine hits both; medians.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import decode_delta
import machine

WAYS = ("plain", "exact_16")


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    speed = machine.bandwidth(args.device)
    results = []
    print("way       batch   step ms   products   cache    step/products  step/(products + cache)")
    for way in WAYS:
        decoder = decode_delta.make(args, way)
        model = decoder if way == "plain" else decoder.dual
        assert model.own_step is not None, "the model's steps are the library's: no products to compare with"
        for batch in args.batches:
            found = measure(args, decoder, model, batch, speed)
            results.append({"way": way, "batch": batch, **found})
            step, products, cache = found["step_ms"], found["products_ms"], found["cache_ms"]
            ratios = f"{step / products:15.2f}{step / (products + cache):17.2f}"
            print(f"{way:10}{batch:5}{step:10.1f}{products:10.1f}{cache:9.1f}{ratios}", flush=True)
    settings = {key: vars(args)[key] for key in ("model", "context", "threads", "dtype", "device")}
    print(json.dumps({**settings, "bytes_per_second": speed, "results": results}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32, 64], dest="batches")
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@torch.inference_mode()
def measure(args, decoder, model, batch, speed):
    """Medians in milliseconds of a step, of its products, and of reading its cache."""
    decoder.allocate(batch, args.context + args.repeats + 1)
    short = [[5 + row % 90, 7] for row in range(batch)]
    decoder.prefill(short, 0)  # allocates; what a slot holds does not change the work
    tokens_N = torch.full((batch,), 7, device=args.device)
    lengths_N = torch.full((batch,), args.context, device=args.device)
    products = make_products(model.own_step, batch)
    times = {"step_ms": [], "products_ms": []}
    for _ in range(args.repeats):
        start = now(args)
        decoder.step(tokens_N, lengths_N, args.context)
        times["step_ms"].append(1e3 * (now(args) - start))
        start = now(args)
        for product in products:
            product()
        times["products_ms"].append(1e3 * (now(args) - start))
    cache_bytes = batch * args.context * model.bytes_per_position
    medians = {key: round(statistics.median(found[3:]), 2) for key, found in times.items()}
    return medians | {"cache_ms": round(1e3 * cache_bytes / speed, 2)}


def now(args):
    machine.synchronize(args.device)
    return time.perf_counter()


def make_products(step, batch):
    """A call for each linear layer of a step, by what the step computes it with."""
    num_rows, compiled = batch * (1 + step.is_dual), step.compiled
    if compiled:
        inputs = [torch.randn(num_rows, p.ins) for p in compiled.products]
        return [
            functools.partial(compiled.multiply, p, x) for p, x in zip(compiled.products, inputs, strict=True)
        ]
    products = [p for layer in step.layers for p in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return [
        functools.partial(p, torch.randn(num_rows, p.base_PI.shape[1]).to(p.base_PI))
        for p in [*products, step.head]
    ]


if __name__ == "__main__":
    main()
