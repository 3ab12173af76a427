"""What decoding and the paper's grid cost at least, from bytes and operations alone. Nothing is run.

    python bench/floor.py                                  # one H100: 3.35 TB/s, 989 TFLOP/s in bfloat16
    python bench/floor.py --bandwidth 4.8e12 --share 0.5   # another device; half of the floor reached

A step reads each weight once and each row's keys and values once, at `bandwidth`, or multiplies at `rate`
where that takes longer. The proxy in dual numbers reads its weights once for twice the rows, and twice the
keys and values. A prompt's and a training step's time is that of their products. Shapes are those of the
models' config.json; that a response has --new tokens is an assumption.
"""

import argparse
import json
from dataclasses import dataclass

GSM8K = {"train": 5231, "holdout": 2242, "test": 1319}  # 70 % and 30 % of 7,473; the test split
NUM_POINTS = 33  # of grid.py


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; heads of queries, keys: heads of keys and values."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    keys: int
    width: int
    vocabulary: int
    is_tied: bool

    @property
    def products(self):
        """Weights that a token is multiplied with."""
        attention = self.hidden * self.width * 2 * (self.heads + self.keys)
        return self.layers * (attention + 3 * self.hidden * self.intermediate) + self.hidden * self.vocabulary

    @property
    def weights(self):
        return self.products + (0 if self.is_tied else self.hidden * self.vocabulary)

    @property
    def cached(self):
        """Numbers in the KV cache per position."""
        return 2 * self.layers * self.keys * self.width


TEACHER = Shape(28, 3584, 18944, 28, 4, 128, 152064, False)  # DeepSeek-R1-Distill-Qwen-7B
PROXY = Shape(36, 2048, 11008, 16, 2, 128, 151936, True)  # Qwen2.5-3B
STUDENT = Shape(28, 3072, 8192, 24, 8, 128, 128256, True)  # Llama-3.2-3B
WAYS = {
    "teacher": [(TEACHER, 1)],
    "exact": [(TEACHER, 1), (PROXY, 2)],
    "central": [(TEACHER, 1), (PROXY, 1), (PROXY, 1)],
    "student": [(STUDENT, 1)],
}


def main():
    args = parse()
    print(f"floor of a step, context {args.prompt + args.new // 2}: ms, tokens/s, GB of weights and caches")
    print("batch  " + "".join(f"{way:>26}" for way in WAYS))
    for batch in (1, 8, 32, 64, 128, 192, 256, 512):
        cells = [describe(args, models, batch) for models in WAYS.values()]
        print(f"{batch:5}  " + "".join(f"{cell:>26}" for cell in cells))
    hours = grid_hours(args)
    print(f"\nGSM8K grid of {NUM_POINTS} points on {args.devices} devices, batch {args.batch}, hours at")
    print(f"{args.share:g} of the floor: " + ", ".join(f"{k} {v:.1f}" for k, v in hours.items()))
    print(json.dumps({**vars(args), "hours": {k: round(v, 3) for k, v in hours.items()}}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second")
    parser.add_argument("--rate", type=float, default=989e12, help="operations per second")
    parser.add_argument("--bytes", type=int, default=2, help="per number")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--new", type=int, default=450)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the floor that is reached")
    return parser.parse_args()


def step_seconds(args, models, batch, context):
    seconds = 0.0
    for shape, copies in models:
        read = shape.products * args.bytes / args.bandwidth
        computed = 2 * shape.products * copies * batch / args.rate
        cache = copies * batch * context * shape.cached * args.bytes / args.bandwidth
        seconds += max(read, computed) + cache
    return seconds


def describe(args, models, batch):
    seconds = step_seconds(args, models, batch, args.prompt + args.new // 2)
    cache = sum(copies * shape.cached for shape, copies in models) * batch * (args.prompt + args.new)
    gigabytes = args.bytes * (sum(shape.weights for shape, _ in models) + cache) / 1e9
    return f"{1e3 * seconds:.1f} {batch / seconds:,.0f} {gigabytes:.0f}"


def decode_hours(args, models, num_rows):
    """Hours of one device to prefill and decode so many rows."""
    context = args.prompt + args.new // 2
    decoding = num_rows * args.new / args.batch * step_seconds(args, models, args.batch, context)
    prompts = (
        sum(2 * shape.products * copies for shape, copies in models) * num_rows * args.prompt / args.rate
    )
    return (decoding + prompts) / 3600


def grid_hours(args):
    """{stage: hours on all devices} of a sweep; stages 1 and 2 run once, 3 to 6 at each point."""
    length = args.prompt + args.new
    backward = 6 * PROXY.products * GSM8K["holdout"] * length / args.rate / 3600
    # adapters: frozen weights need no gradient of their own; 3 epochs
    distil = 3 * 4 * STUDENT.products * GSM8K["train"] * length / args.rate / 3600
    once = decode_hours(args, WAYS["teacher"], GSM8K["holdout"]) + backward
    points = {
        "training traces": decode_hours(args, WAYS["exact"], GSM8K["train"]),
        "distillation": distil,
        "student test": decode_hours(args, WAYS["student"], GSM8K["test"]),
        "teacher test": decode_hours(args, WAYS["exact"], GSM8K["test"]),
    }
    hours = {"stages 1 and 2": once} | {stage: NUM_POINTS * hours for stage, hours in points.items()}
    hours["all"] = sum(hours.values())
    return {stage: value / args.devices / args.share for stage, value in hours.items()}


if __name__ == "__main__":
    main()
