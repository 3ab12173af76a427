"""Print the sweep, a line of `tau lam eps [key=value ...]` per grid point (edit POINTS below,
or name points on the command line or in a file).

python grid.py                                   # the default grid
python grid.py --shard 0/4                       # every fourth point, for one of four machines
python grid.py --points 0.6,0,0 0.6,0.03,0       # these points alone
python grid.py --file runs/x/matched.txt         # those that search.py found
"""

import argparse
import itertools
import os
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ads.stage.config import SWEPT, make_config
from ads.stage.errors import UserError
from ads.stage.settings import GenConfig

# The paper's models reach 70 % teacher accuracy on GSM8K at lam of about 0.03.
EPS = "0"  # the exact derivative (docs/delta.md); above 0: central difference
TEMPERATURES = [(f"{0.6 + 0.2 * i:.1f}", "0", "0") for i in range(13)]
STRENGTHS = [("0.6", f"{0.003 * i:.3f}", EPS) for i in range(1, 21)]
POINTS = TEMPERATURES + STRENGTHS
SHUFFLE_SEED = 42  # both arms fill up evenly, so that a sweep that is cut short can be plotted


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    points = args.points or args.file or shuffled(POINTS)
    index, count = args.shard
    for point in points[index::count]:
        print(*point)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", type=shard, default=(0, 1), metavar="i/n", help="part i of n, i from 0")
    named = parser.add_mutually_exclusive_group()
    words: dict[str, Any] = {"nargs": "+", "metavar": "tau,lam,eps[,key=value...]"}
    named.add_argument("--points", type=point, **words, help="instead of the default grid")
    named.add_argument("--file", type=points_in, metavar="PATH", help="the same, one `tau lam eps` a line")
    return parser.parse_args(arguments)


def shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: write i/n with 0 <= i < n")
    return int(index), int(count)


def point(text: str) -> tuple[str, ...]:
    values = tuple(text.split(","))
    try:
        tau, lam, eps = map(float, values[:3])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write tau,lam,eps") from None
    if not (0 <= tau < float("inf") and abs(lam) < float("inf") and 0 <= eps < float("inf")):
        raise argparse.ArgumentTypeError(f"{text!r}: tau and eps must be at least 0, all three finite")
    return (*values[:3], *checked(values[3:], text))


def checked(words: Sequence[str], text: str) -> list[str]:
    """Words that gentraces.py takes, and that can be part of a file name.

    `random 1`, as in earlier versions, is defence=random direction_seed=1.
    """
    settings = {}
    for key, word in itertools.zip_longest(("defence", "direction_seed"), words):
        if word is not None:
            name, equals, value = word.partition("=") if "=" in word else (key or word, "=", word)
            settings[name] = value
    if wrong := [name for name in settings if name not in SWEPT]:
        raise argparse.ArgumentTypeError(f"{text!r}: {wrong[0]} is no key of gentraces.py to be swept")
    if wrong := [
        f"{name}={value}" for name, value in settings.items() if not value or set(value) & set("/\\ ")
    ]:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {wrong[0]} becomes part of a file name: no blank, no slash"
        )
    try:
        make_config(GenConfig, settings, dict.fromkeys(settings, "the grid"))
    except UserError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return [f"{name}={value}" for name, value in settings.items()]


def points_in(path: str) -> list[tuple[str, ...]]:
    """The points of a file, each once; its blank lines and # comments are left out."""
    points: dict[tuple[str, ...], None] = {}
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                points[point(",".join(line.split()))] = None
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{path}, line {number}: {error}") from None
    if not points:
        raise argparse.ArgumentTypeError(f"{path}: holds no point")
    return list(points)


def shuffled(points: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    found = list(points)
    random.Random(SHUFFLE_SEED).shuffle(found)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
