"""Products of float32 matrices in matrix registers (ads/matmul.py) beside torch's, GFLOP/s.

    python bench/matmul.py --threads 2 --sizes 420,576,1536 1500,1536,576

SIZES are rows, inputs and outputs of a linear layer: y = x W^T, dx = dy W and dw = dy^T x, with the weights
of LAYERS layers in turn, so that they come from memory. Ways take turns; medians of the passes.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ads import matmul
from ads.cpu.memory import keep_freed_memory

LAYERS, PASSES = 40, 5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["420,576,1536", "1500,576,1536"])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if matmul.library() is None:
        sys.exit("no compiler or no matrix registers (AMX) here: nothing to compare")
    keep_freed_memory("cpu")
    for size in args.sizes:
        num_rows, ins, outs = map(int, size.split(","))
        print(size, *measure(num_rows, ins, outs), sep="  ", flush=True)


def measure(num_rows, ins, outs):
    """What is printed of y, dx and dw."""
    x, dy = torch.randn(num_rows, ins), torch.randn(num_rows, outs)
    weights = [torch.randn(outs, ins) for _ in range(LAYERS)]
    found = []
    for name in ("y", "dx", "dw"):
        rates = {matmul.multiply: [], torch.mm: []}
        for _ in range(PASSES):
            for multiply in rates:
                start = time.perf_counter()
                for weight in weights:
                    multiply(*{"y": (x, weight.T), "dx": (dy, weight), "dw": (dy.T, x)}[name])
                operations = 2 * num_rows * ins * outs * LAYERS
                rates[multiply].append(operations / (time.perf_counter() - start) / 1e9)
        ours, theirs = (round(statistics.median(values)) for values in rates.values())
        found.append(f"{name} {ours} (torch {theirs})")
    return found


if __name__ == "__main__":
    main()
