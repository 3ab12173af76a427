"""Grid points -> curves: the points of an arm that differ in its knob alone, over all seeds.

Seeds that agree in everything are replicates: their stages are tested on the same problems. Curves are told
apart by all settings of all stages.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ads.report import results
from ads.report.numbers import is_number, pooled_interval, show_setting, show_span
from ads.report.results import SYMBOLS, ResultRow, Rows

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A grid point of one replicate: its row of numbers and the sidecars of its stages, by role.

    `copies`: the points that were pooled into this one, where the same was measured more than once.
    """

    row: ResultRow
    stages: Mapping[str, dict]
    copies: tuple["Point", ...] = ()

    @property
    def parts(self) -> tuple["Point", ...]:
        """The measured points behind this one."""
        return self.copies or (self,)


Points = Sequence[Point]


@dataclass(frozen=True)
class Curve:
    """The points of an arm that differ in tau (temperature) or lam alone, over all seeds.

    `start` holds the lam = 0 points at the tau of the others, where their curve begins.
    """

    arm: str
    label: str
    points: list[Point]
    start: list[Point]

    @property
    def line(self) -> list[Point]:
        """All points that it is drawn through."""
        return [*self.start, *self.points]

    @property
    def short_label(self) -> str:
        """The label without the range of lam, as in "ADS (tau = 0.6)"."""
        arm, *parts = self.label.split(", ")
        return f"{arm} ({', '.join(part for part in parts if not part.startswith(SYMBOLS['lam']))})"

    @property
    def name(self) -> str:
        """The label without the knobs, as in "ADS, top-1 kept"."""
        parts = self.label.split(", ")
        return ", ".join(part for part in parts if not part.startswith(tuple(SYMBOLS.values())))

    @property
    def caps(self) -> list[str]:
        """The caps that are set, in words."""
        return self.points[0].row.caps


def group_by(items: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """{key: items}, each group in order."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def by_replicate(points: Iterable["Point"]) -> dict[tuple[int, int | None], list["Point"]]:
    return group_by(points, lambda point: point.row.replicate)


def pool_copies(points: Iterable[Point]) -> list[Point]:
    """The complete points; those with the same settings and seeds as one, the mean of their numbers."""
    pooled = []
    for same in group_by((point for point in points if point.row.is_complete), what_was_run).values():
        mean = Point(results.mean_row([point.row for point in same]), same[0].stages, tuple(same))
        pooled.append(mean if len(same) > 1 else same[0])
    return pooled


def what_was_run(point: Point) -> tuple:
    row = point.row
    return row.arm, row.tau, row.lam, results.identity(row), *map(row.number, results.SEEDS)


def make_curves(points: Iterable[Point]) -> list[Curve]:
    """The curves through the complete points, in the order of the arms."""
    points = pool_copies(points)
    names = results.differing([point.row for point in points], results.SEEDS)
    groups = list(group_by(points, curve_of).values())
    return [
        Curve(group[0].row.arm, label, group, find_start(points, group[0].row))
        for group, label in zip(groups, curve_labels(groups, names), strict=True)
    ]


def curve_labels(groups: Sequence[Points], names: Iterable[str]) -> list[str]:
    """The labels of curves by their points; `names`: the settings in which they differ."""
    told = {name: left_out(name, [points[0].row for points in groups]) for name in names}
    return [curve_label(points, told) for points in groups]


def left_out(key: str, curves: Rows) -> Any:
    """The value of a setting that labels do not name: its default where all curves but one have that, which
    are two or more; else None.

    curves: a row of each.
    """
    values = [row.number(key) for row in curves if row.number(key) is not None]
    default = results.default_of(key)
    return default if len(values) > 2 and values.count(default) == len(values) - 1 else None


def curve_of(point: Point) -> tuple:
    return point.row.arm, point.row.tau if point.row.lam else None, results.identity(point.row)


def find_start(points: Points, first: ResultRow) -> list[Point]:
    """The temperature points that share tau and all else with a curve of another arm."""
    if not first.lam:
        return []
    wanted = first.tau, results.identity(first, with_defence=False)
    plain = [point for point in points if point.row.arm == "temperature"]
    return [p for p in plain if (p.row.tau, results.identity(p.row, False)) == wanted]


def curve_label(points: Points, told: Mapping[str, Any]) -> str:
    """The arm, the range of its knob, and the settings in which curves differ.

    told: {setting: the value that is not named}.
    """
    columns = [point.row.columns for point in points]
    first, parts = columns[0], [points[0].row.arm]
    for key in ("tau", "lam") if points[0].row.lam else ("tau",):
        span = show_span(results.values_of(columns, key), show_setting)
        parts.append(f"{SYMBOLS[key]} = {span}")
    named = [name for name, default in told.items() if first.get(name) not in (None, default)]
    parts += [results.show_named(name, first[name]) for name in named]
    return ", ".join(parts)


def by_setting(points: Iterable[Point]) -> dict[tuple[float, float], list[ResultRow]]:
    """{(tau, lam): rows of all seeds}, in order; the random directions of a seed as their mean."""
    ordered = sorted((point.row for point in points), key=knobs)
    return {
        setting: [results.mean_row(same) for same in group_by(group, lambda row: row.replicate).values()]
        for setting, group in group_by(ordered, knobs).items()
    }


def pair_up(curves: Iterable[Curve]) -> list[tuple[Curve, Curve]]:
    """(temperature curve, other curve) that share all settings but those of Delta."""
    shared = [(results.identity(curve.points[0].row, with_defence=False), curve) for curve in curves]
    baselines = {key: curve for key, curve in shared if curve.arm == "temperature"}
    return [
        (baselines[key], curve) for key, curve in shared if curve.arm != "temperature" and key in baselines
    ]


def knobs(row: ResultRow) -> tuple[float, float]:
    return row.tau, row.lam


def all_rows(curves: Iterable[Curve]) -> list[ResultRow]:
    return [point.row for curve in curves for point in curve.points]


def pooled(seeds: Rows, who: str, answers: str) -> tuple[float, float, float]:
    """(mean, low, high) over seeds of an accuracy, with a 95 % interval."""
    found = [row.accuracy(who, answers) for row in seeds]
    shares = np.array([accuracy.share for accuracy in found])
    sizes = np.array([accuracy.size for accuracy in found])
    return float(shares.mean()), *pooled_interval(shares, sizes)


@dataclass(frozen=True)
class Axes:
    """What curves are drawn and read in: students' accuracy, by forced or raw answers, against a price."""

    answers: str
    price: str = "accuracy"

    def graded(self, points: Iterable[Point]) -> list[Point]:
        """The points that have a place in them."""
        return [point for point in points if self.graded_rows([point.row])]

    def graded_rows(self, rows: Rows) -> list[ResultRow]:
        """The rows whose teacher and student were both graded, and whose price is known."""
        rows = [row for row in rows if all(row.accuracy(who, self.answers).is_share for who in results.TESTS)]
        return [row for row in rows if is_number(row.price(self.price, self.answers))]

    def settings(self, points: Iterable[Point]) -> list[list[ResultRow]]:
        """The rows of all seeds, a list a setting, without those that have no place."""
        return list(filter(None, map(self.graded_rows, by_setting(points).values())))

    def place(self, row: ResultRow) -> tuple[float, float]:
        return row.price(self.price, self.answers), row.share("student", self.answers)

    def xy(self, points: Points) -> np.ndarray:
        """Prices and students' accuracies (2, P)."""
        return np.array([self.place(point.row) for point in points]).reshape(-1, 2).T

    def mean_price(self, seeds: Rows) -> float:
        return float(np.mean([self.place(row)[0] for row in seeds]))
