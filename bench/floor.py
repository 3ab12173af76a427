"""What decoding and the paper's grid cost, from bytes, operations and launches. Nothing is run.

    python bench/floor.py                                  # one H100: 3.35 TB/s, 989 TFLOP/s in bfloat16
    python bench/floor.py --bandwidth 4.8e12 --share 0.5   # another device; half of the floor reached
    python bench/floor.py --launch_us 24 --devices 1       # a slow host, one GPU

The floor: a step reads each weight once and each row's keys and values once, at `bandwidth`, or multiplies at
`rate` where that takes longer. The proxy in dual numbers reads its weights once for twice the rows, and twice
the keys and values. A prompt's and a training step's time is that of their products. Shapes are those of the
models' config.json; that a response has --new tokens in the mean, the last ones --longest, is an assumption.

The grid: a step takes the floor over --share, or what the host needs to launch its kernels if that is longer;
to that come start-up and loading (--start_seconds for the stages of a point, which share a process).
"""

import argparse
import json
import math
from dataclasses import dataclass

GSM8K = {"train": 5231, "holdout": 2242, "test": 1319}  # 70 % and 30 % of 7,473; the test split
NUM_POINTS = 33  # of grid.py
# Kernels and products of a decoding step at batch 192; of a training step (forward, backward, clipping and
# AdamW) and of a step of evaluation, whatever their rows. Counted on a CUDA runtime whose kernels do nothing.
LAUNCHES = {"teacher": 318, "exact": 1098, "student": 318, "training": 5004, "evaluation": 2136}
EPOCHS, BATCH, ROWS_AT_ONCE = 3, 16, 8  # of train_config.yaml; at most, on fewer devices
NUM_EVALUATIONS = 3


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
    seconds = grid_seconds(args)
    seconds["all"] = {limit: sum(found[limit] for found in seconds.values()) for limit in LIMITS}
    print(f"\nGSM8K grid of {NUM_POINTS} points on {args.devices} devices, batch {args.batch}: hours by")
    print(f"{args.share:g} of the floor alone; with {args.launch_us:g} us for a launch and start-up")
    for stage, found in seconds.items():
        print(f"{stage:18}" + "".join(f"{found[limit] / 3600:8.2f}" for limit in LIMITS))
    print(json.dumps({**vars(args), "seconds": seconds}))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second")
    parser.add_argument("--rate", type=float, default=989e12, help="operations per second")
    parser.add_argument("--float32_rate", type=float, default=67e12, help="the same in float32, for stage 2")
    parser.add_argument("--bytes", type=int, default=2, help="per number")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--new", type=int, default=450)
    parser.add_argument("--longest", type=int, default=874, help="new tokens of the last row to end")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--share", type=float, default=0.5, help="of the floor that is reached")
    parser.add_argument("--launch_us", type=float, default=20, help="microseconds of the host per launch")
    parser.add_argument("--start_seconds", type=float, default=90, help="of a process with all it loads")
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


LIMITS = "floor", "host"


def longer(args, floor, launches):
    """{limit: seconds}: of the share of the floor, and of the host's launches where they take longer."""
    at_share = floor / args.share
    return {"floor": at_share, "host": max(at_share, 1e-6 * launches * args.launch_us)}


def times(count, seconds):
    return {limit: round(count * value, 1) for limit, value in seconds.items()}


def plus(*parts):
    return {limit: sum(part[limit] for part in parts) for limit in LIMITS}


def decode_seconds(args, way, num_rows):
    """Seconds to prefill and decode so many rows, dealt to all devices."""
    rows, models = math.ceil(num_rows / args.devices), WAYS[way]
    step = step_seconds(args, models, min(args.batch, rows), args.prompt + args.new // 2)
    # slots are refilled; as the prompts run out, the last rows end in ever emptier batches
    steps = max(0, rows - args.batch) * args.new / args.batch + args.longest
    prompts = sum(2 * shape.products * copies for shape, copies in models) * rows * args.prompt / args.rate
    return plus(times(steps, longer(args, step, LAUNCHES[way])), times(1, longer(args, prompts, 0)))


def distil_seconds(args):
    """Seconds of a student's training, whose frozen weights need no gradient, and of its evaluations."""
    length = args.prompt + args.new
    rows = max(1, min(ROWS_AT_ONCE, BATCH // args.devices))
    passes = EPOCHS * math.ceil(GSM8K["train"] / BATCH) * BATCH / args.devices / rows
    training = 4 * STUDENT.products * rows * length / args.rate
    evaluations = NUM_EVALUATIONS * GSM8K["holdout"] / args.devices / rows
    evaluation = 2 * STUDENT.products * rows * length / args.rate
    return plus(
        times(passes, longer(args, training, LAUNCHES["training"])),
        times(evaluations, longer(args, evaluation, LAUNCHES["evaluation"])),
    )


def grid_seconds(args):
    """{stage: {limit: seconds}} of a sweep; stages 1 and 2 run once, 3 to 6 at each point."""
    length = args.prompt + args.new
    backward = 6 * PROXY.products * GSM8K["holdout"] * length / args.float32_rate / args.devices
    once = plus(decode_seconds(args, "teacher", GSM8K["holdout"]), times(1, longer(args, backward, 0)))
    points = {
        "training traces": decode_seconds(args, "exact", GSM8K["train"]),
        "distillation": distil_seconds(args),
        "student test": decode_seconds(args, "student", GSM8K["test"]),
        "teacher test": decode_seconds(args, "exact", GSM8K["test"]),
        "start-up": {"floor": 0.0, "host": args.start_seconds},
    }
    return {"stages 1 and 2": once} | {stage: times(NUM_POINTS, found) for stage, found in points.items()}


if __name__ == "__main__":
    main()
