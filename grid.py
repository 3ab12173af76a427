"""Print the sweep, one `tau lam eps` line per grid point (edit ARMS below, or name points on the command
line).

python grid.py                                   # the default grid
python grid.py --shard 0/4                       # every fourth point, for one of four machines
python grid.py --points 0.6,0,0 0.6,0.03,1e-3    # these points alone
"""

import argparse
import random
import sys

# The paper's models reach 70 % teacher accuracy on GSM8K at lam of about 0.03.
EPS = "1e-3"
TEMPERATURE_ARM = [(f"{0.6 + 0.2 * i:.1f}", "0", "0") for i in range(13)]
ADS_ARM = [("0.6", f"{0.003 * i:.3f}", EPS) for i in range(1, 21)]
ARMS = TEMPERATURE_ARM + ADS_ARM
SHUFFLE_SEED = 42  # both arms fill up evenly, so that a sweep that is cut short can be plotted


def main(arguments):
    args = parse(arguments)
    points = args.points or shuffled(ARMS)
    index, count = args.shard
    for point in points[index::count]:
        print(*point)


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="i/n", help="part i of n, i from 0")
    parser.add_argument(
        "--points", type=point, nargs="+", metavar="tau,lam,eps", help="instead of the default grid"
    )
    return parser.parse_args(arguments)


def shard(text):
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n with 0 <= i < n")
    return int(index), int(count)


def point(text):
    values = tuple(text.split(","))
    try:
        tau, lam, eps = map(float, values)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write tau,lam,eps") from None
    if not (0 <= tau < float("inf") and abs(lam) < float("inf") and 0 <= eps < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r}: tau and eps must be at least 0, all three finite")
    return values


def shuffled(points):
    points = list(points)
    random.Random(SHUFFLE_SEED).shuffle(points)
    return points


if __name__ == "__main__":
    main(sys.argv[1:])
