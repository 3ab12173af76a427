"""Students compared at equal price: the arms at one accuracy or NLL of the teacher, with intervals."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ads.report import results
from ads.report.bootstrap import NUM_DRAWS, Draws
from ads.report.curves import Axes, Curve, Point, Points, by_replicate, by_setting, group_by, knobs, pair_up
from ads.report.numbers import seed_interval
from ads.report.results import ANSWERS, NO_SHARE, POOLED, PRICES, TESTS, show_knob

LEVELS = (0.85, 0.8, 0.75, 0.65)  # teacher accuracies to compare at
NUM_LEVELS = 4  # where LEVELS do not fit
LEAST_BRACKETED = 0.9  # share of the draws that must reach a level
WIDEST_BRACKET = 0.1  # of teacher accuracy, between the settings that a reading lies between
WIDEST_SHARE = 0.25  # the same for other prices, as a share of the range that both curves span
WIDE = "is read across more than {}"
ZIGZAG = "is not monotone there, it meets this {}"
Pairs = Sequence[tuple[Curve, Curve]]
Levels = Sequence[float]
Replicate = tuple[int, int | None]  # its seeds
Sides = Sequence[Mapping[Replicate, Points]]
Readings = Mapping[Replicate, np.ndarray]  # the price, each curve's student
Measured = Any  # a float, or None where there is none
Interval = tuple[Measured, Measured, str]  # low, high, why there are none


@dataclass(frozen=True)
class Match:
    """Students' accuracies at one price to the teacher, its accuracy or NLL; the difference is temperature
    minus arm (or what stands in temperature's place).

    `note` says why there is no difference or no interval, `flags` what puts the numbers in doubt.
    """

    answers: str
    arm: str
    name: str
    level: Measured = None
    temperature: Measured = None
    student: Measured = None
    difference: Measured = None
    low: Measured = None
    high: Measured = None
    num_seeds: int = 0
    note: str = ""
    flags: tuple[str, ...] = ()
    price: str = "accuracy"


def interpolate(x: np.ndarray, y: np.ndarray, levels: Levels | np.ndarray) -> np.ndarray:
    """y (..., L) at `levels` on the broken lines through points x, y (..., P), sorted by x; nan outside.

    Points of one x are one, the mean of their y.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    levels = np.broadcast_to(levels, (*x.shape[:-1], np.shape(levels)[-1]))
    if x.shape[-1] < 2:
        return np.full(levels.shape, np.nan)
    is_same = x[..., :, None] == x[..., None, :]
    y = (is_same * y[..., None, :]).sum(-1) / is_same.sum(-1)
    order = np.argsort(x, axis=-1, kind="stable")
    x, y = np.take_along_axis(x, order, -1), np.take_along_axis(y, order, -1)
    num_below = (x[..., None, :] <= levels[..., None]).sum(-1)  # (..., L)
    left = np.clip(num_below - 1, 0, x.shape[-1] - 2)
    x0, x1, y0, y1 = (np.take_along_axis(v, left + i, -1) for v in (x, y) for i in (0, 1))
    width = x1 - x0
    weight = np.where(width > 0, (levels - x0) / np.where(width > 0, width, 1), 0.0)
    inside = (x[..., :1] <= levels) & (levels <= x[..., -1:])
    return np.where(inside, y0 + weight * (y1 - y0), np.nan)


def compare_arms(curves: Sequence[Curve], levels: Levels | None, draws: Draws) -> list[Match]:
    """The arms at equal teacher accuracies, those given or else the usual ones, and at each other price."""
    pairs = pair_up(curves)
    every = [Axes(answers, price) for price in PRICES for answers in ANSWERS]
    return [match for axes in every for match in compare(pairs, axes, levels_at(pairs, axes, levels), draws)]


def levels_at(pairs: Pairs, axes: Axes, levels: Levels | None) -> Levels:
    """Where to compare: at the given teacher accuracies, if there are any, or the usual ones."""
    given = levels if axes.price == "accuracy" else None
    return given or choose_levels(pairs, axes)


def choose_levels(pairs: Pairs, axes: Axes) -> Levels:
    """Where to compare: LEVELS of teacher accuracy; or, for NLL and where no ADS curve reaches one of them,
    four rounded values inside the range that it has in common with temperature. Without ADS: any other."""
    of_ads = [pair for pair in pairs if pair[1].arm == "ADS"]
    ranges = [common_range(pair, axes) for pair in of_ads or pairs]
    ranges = [(low, high) for low, high in ranges if low < high]
    usual = LEVELS if axes.price == "accuracy" else ()
    if not ranges or any(low <= level <= high for low, high in ranges for level in usual):
        return usual
    low, high = max(ranges, key=lambda ends: ends[1] - ends[0])
    inside = np.linspace(low, high, NUM_LEVELS + 2)[1:-1]
    if axes.price == "accuracy":
        return tuple(dict.fromkeys(round(float(v), 3) for v in inside[::-1]))
    digits = 1 - int(np.floor(np.log10(high - low)))  # steps are about a fifth of the range
    return tuple(dict.fromkeys(v for v in (round(float(v), digits) for v in inside) if low <= v <= high))


def common_range(pair: tuple[Curve, Curve], axes: Axes) -> tuple[float, float]:
    """The prices (lowest, highest) that both curves span, by their settings' means."""
    prices = [[axes.mean_price(seeds) for seeds in axes.settings(curve.line)] for curve in pair]
    lows = [min(found, default=np.inf) for found in prices]
    return max(lows), min(max(found, default=-np.inf) for found in prices)


def compare(pairs: Pairs, axes: Axes, levels: Levels, draws: Draws) -> list[Match]:
    """A Match per pair of curves and level; an arm of one setting is compared at its own price."""
    arms = [curve.arm for _, curve in pairs]
    matches = []
    for first, curve in pairs:
        name = curve.arm if arms.count(curve.arm) == 1 and not curve.caps else curve.short_label
        found = compare_pair(axes, first, curve, name, levels, draws)
        matches += found if curve.arm == "ADS" and not curve.caps else without_gaps(found)
    return matches


def without_gaps(matches: list[Match]) -> list[Match]:
    """The matches of a control or a capped curve where both arms are; one, which says so, where they never
    are."""
    return [match for match in matches if match.num_seeds] or matches[:1]


def compare_pair(
    axes: Axes, first: Curve, other: Curve, name: str, levels: Levels, draws: Draws
) -> list[Match]:
    """Matches of two curves at the levels, or at the other's own price where it is one setting."""
    points, at = (other.points, [None]) if is_lone(other) else (other.line, levels)
    if not axes.graded(points):
        return []
    sides = [by_replicate(side) for side in (first.line, points)]
    measured, drawn = read_sides(axes, sides, None if is_lone(other) else levels, draws)
    matches = []
    for i, level in enumerate(at):
        found, resampled = ({key: values[..., i] for key, values in r.items()} for r in (measured, drawn))
        blank = Match(axes.answers, other.arm, name, level, price=axes.price)
        flags = flags_of(axes, (first.arm, name), sides, found)
        matches.append(replace(fill(blank, found, resampled, draws.missing), flags=flags))
    return matches


def is_lone(curve: Curve) -> bool:
    """Whether a curve is one setting, to be read at its own price."""
    return len(by_setting(curve.points)) == 1 and not (curve.arm == "ADS" and curve.start)


def read_sides(axes: Axes, sides: Sides, levels: Levels | None, draws: Draws) -> tuple[Readings, Readings]:
    """What is read off one curve or two at the levels, or at the last one's own price where there are none:
    as measured (1 + sides, L) and under resampled problems (1 + sides, B, L).

    Random directions of a replicate are read off one by one, and their mean is the replicate's.
    """
    *others, last = sides
    measured: dict[Replicate, np.ndarray] = {}
    drawn: dict[Replicate, np.ndarray] = {}
    for key in (key for key in last if all(key in side for side in others)):
        beside = [axes.graded(side[key]) for side in others]
        lines = [axes.graded(points) for points in directions(last[key])]
        if not all((*beside, *lines)):
            continue
        readings = [[axes.xy(points) for points in (*beside, line)] for line in lines]
        measured[key] = np.mean([read_off(reading, levels) for reading in readings], axis=0)
        resampled = [[drawn_xy(axes, points, draws) for points in (*beside, line)] for line in lines]
        if not any(xy is None for reading in resampled for xy in reading):
            drawn[key] = np.mean([read_off(reading, levels) for reading in resampled], axis=0)
    return measured, drawn


def directions(points: Points) -> list[list[Point]]:
    """A replicate's points by random direction, each with the lam = 0 points; all where there is one."""
    groups = group_by((p for p in points if p.row.lam), lambda point: point.row.direction_seed)
    start = [point for point in points if not point.row.lam]
    return [[*start, *group] for group in groups.values()] or [start]


def read_off(lines: Sequence[Any], levels: Levels | None) -> np.ndarray:
    """(1 + lines, ..., L): price, and each line's students there; a line is x, y (2, ..., P)."""
    last = lines[-1]
    if levels is None:
        return np.stack([last[0], *(interpolate(x, y, last[0]) for x, y in lines[:-1]), last[1]])
    students = [interpolate(x, y, levels) for x, y in lines]
    return np.stack([np.broadcast_to(levels, students[0].shape), *students])


def drawn_xy(axes: Axes, points: Points, draws: Draws) -> np.ndarray | None:
    """x, y (2, B, P) under B resamples of the problems; None where a test's answers are missing.

    A price other than accuracy is held at its measured value: of single problems it is not read.
    """
    lines = [[draws.of(point, who, axes.answers) for point in points] for who in TESTS]
    if PRICES[axes.price].column:
        lines[0] = [np.full(NUM_DRAWS, price) for price in axes.xy(points)[0]]
    if any(drawn is None for line in lines for drawn in line):
        return None
    return np.array(lines).transpose(0, 2, 1)


def fill(match: Match, measured: Readings, drawn: Readings, missing: str) -> Match:
    """The Match with what was read off at its level; nan: not reached."""
    paired = reached_by(measured)
    found = np.array([measured[key] for key in paired or measured]).reshape(-1, 3).T
    level, first, other = map(mean_of_reached, found)
    level = level if match.level is None else match.level
    match = replace(match, level=level, temperature=first, student=other, num_seeds=len(paired))
    if not paired:
        return replace(match, note="not reached by both" if measured else "no seed in common")
    resampled = [drawn[key][1] - drawn[key][2] for key in paired if key in drawn]
    low, high, note = interval_of(found[1] - found[2], resampled, missing)
    return replace(match, difference=first - other, low=low, high=high, note=note)


def mean_of_reached(values: np.ndarray) -> Measured:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def reached_by(measured: Readings) -> list[Replicate]:
    """The replicates in which both curves reach the level."""
    return [key for key, values in measured.items() if np.isfinite(values).all()]


def interval_of(
    values: np.ndarray, drawn: Sequence[np.ndarray], missing: str, least: float = -1.0, most: float = 1.0
) -> Interval:
    """The t interval over seeds; of one seed what its readings (B,) under resampled problems span, which
    knows nothing of how seeds differ. No value can lie beyond `least` and `most`.
    """
    if len(values) > 1:
        low, high = map(float, seed_interval(values, least, most))
        return (low, high, "") if np.isfinite(low) else (None, None, "no interval: the seeds do not differ")
    return percentiles(drawn[0]) if drawn else (None, None, f"no interval: {missing}")


def percentiles(drawn: np.ndarray) -> Interval:
    """The 95 % percentile interval of what was read under resampled problems (B,)."""
    reached = np.isfinite(drawn)
    if reached.mean() < LEAST_BRACKETED:
        return None, None, "no interval: too near the end of a curve"
    low, high = np.percentile(drawn[reached], (2.5, 97.5))
    return float(low), float(high), ""


def flags_of(axes: Axes, names: Sequence[str], sides: Sides, measured: Readings) -> tuple[str, ...]:
    """Sentences on what makes the readings at a level doubtful; `names` are those of the sides."""
    paired, texts = reached_by(measured), []
    if 0 < len(paired) < len(measured):
        price = PRICES[axes.price].words
        texts.append(f"{len(paired)} of {len(measured)} seeds reach this {price} on both curves")
    if (num := len({seed for seed, _ in paired})) < len(paired):
        texts.append(f"students of {len(paired)} seeds, traces of {num}")
    for name, side in zip(names, sides, strict=True):
        found: dict[str, dict[str, dict]] = {}  # {what is doubtful: {case: seeds}}
        for key in paired:
            widest = widest_bracket(axes, [s[key] for s in sides])
            for points in directions(side[key]):
                for kind, case in line_flags(axes, points, measured[key][0], widest):
                    found.setdefault(kind, {}).setdefault(case, {})[key[0]] = None
        texts += [f"{name} {kind}: {show_cases(cases, len(paired))}" for kind, cases in found.items()]
    return tuple(texts)


def show_cases(cases: Mapping[str, Collection], num_seeds: int) -> str:
    """Texts of {case: seeds}, with the seeds where it is some of several."""
    return ", ".join(
        case if len(seeds) == num_seeds else f"{case} (seed {' and '.join(map(str, seeds))})"
        for case, seeds in cases.items()
    )


def widest_bracket(axes: Axes, sides: Sequence[Points]) -> float:
    """The price between two settings above which a reading between them is in doubt."""
    if axes.price == "accuracy":
        return WIDEST_BRACKET
    prices = [axes.xy(axes.graded(points))[0] for points in sides]
    return WIDEST_SHARE * (min(map(max, prices)) - max(map(min, prices)))


def line_flags(axes: Axes, points: Points, level: float, widest: float) -> Iterable[tuple[str, str]]:
    """(kind, case) of what makes one line doubtful where it is read, at a price."""
    ends = axes.graded(points)
    if len({knobs(point.row) for point in ends}) > 1:  # else a lone setting, read at its own price
        kept = sorted(ends, key=lambda point: (abs(point.row.lam), point.row.tau))
        x = axes.xy(kept)[0]
        below, above = x[x <= level].max(), x[x >= level].min()
        ends = [point for point, price in zip(kept, x, strict=True) if price in (below, above)]
        if above - below > widest:
            yield WIDE.format(PRICES[axes.price].wide), " to ".join(show_knob(p.row) for p in ends)
        if (num := num_crossings(x - level)) > 1:
            yield ZIGZAG.format(PRICES[axes.price].words), f"{num} times"
    for point in ends:
        if point.copies:
            yield POOLED, show_knob(point.row)
    for point in points:
        if any(axes.answers == lost for part in point.parts for lost, _ in results.lost_shares(part.row)):
            yield NO_SHARE, show_knob(point.row)


def num_crossings(heights: np.ndarray) -> int:
    """How often a broken line with these heights, in the order of the knob, meets 0."""
    heights = np.asarray(heights)
    return int((heights == 0).sum() + (heights[1:] * heights[:-1] < 0).sum())
