"""Attackers against defences: what each attacker's students know at an equal price to the teacher.

An attacker is an attack with one recipe, a defence an arm with all settings that it is sampled with: a
curve of students belongs to one of each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ads.arms import LABELS
from ads.report import results
from ads.report.bootstrap import Draws
from ads.report.compare import (
    Levels,
    Measured,
    Readings,
    directions,
    interval_of,
    is_lone,
    line_flags,
    read_sides,
    widest_bracket,
)
from ads.report.curves import (
    Axes,
    Curve,
    Point,
    Points,
    by_replicate,
    curve_labels,
    group_by,
    make_curves,
)
from ads.report.experiments import NAIVE, Recipe, title_of
from ads.report.gap import Gap
from ads.report.numbers import show_setting
from ads.report.results import ResultRow, show_knob

ATTACKERS = ("attack", "student", "student_few_shot")  # settings of the attacker, with those of these stages:
ATTACKER_STAGES = ("attack", "model", "student")
NO_ROW = "no row left"
NOT_REACHED = "not reached"
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Attacker:
    """An attack with one recipe: its students' curves, by defence.

    `emptied`: the points of a defence at which the attack left no row to train on, in words.
    """

    name: str
    label: str
    curves: Mapping[Key, Curve] = field(default_factory=dict)
    emptied: Mapping[Key, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Defence:
    """An arm with all settings but its knob."""

    key: Key
    arm: str
    label: str


@dataclass(frozen=True)
class Cell:
    """The accuracy of an attacker's students at one price of a defence, and the share of the gap recovered.

    `note` says why there is no number or no interval, `gap_note` why there is no share, `flags` what puts the
    number in doubt. is_own: it is the same in the tables of all prices, as a defence of one setting is read
    at its own, and one without students at none.
    """

    defence: str
    arm: str
    attacker: str
    attack: str
    answers: str
    price: str
    level: Measured = None
    is_own: bool = False
    student: Measured = None
    low: Measured = None
    high: Measured = None
    num_seeds: int = 0
    note: str = ""
    gap: Measured = None
    gap_low: Measured = None
    gap_high: Measured = None
    gap_note: str = ""
    flags: tuple[str, ...] = ()


def main_attack(points: Points) -> str:
    """The attack that curves, matches and claims are about: naive, or the first there is."""
    names = [point.row.attack for point in points if point.row.attack]
    return NAIVE if NAIVE in names or not names else str(names[0])


def of_main_attack(points: Points) -> list[Point]:
    """The points of one attack alone, and those without a student."""
    name = main_attack(points)
    return [point for point in points if point.row.attack in (None, name)]


def is_attackers(key: str) -> bool:
    """Whether a setting is the attacker's to choose."""
    return key in ATTACKERS or key.rpartition(".")[0] in ATTACKER_STAGES


def attacker_of(row: ResultRow) -> Key:
    return tuple((key, value) for key, value in results.identity(row) if is_attackers(key))


def defence_of(row: ResultRow) -> Key:
    settings = [(key, value) for key, value in results.identity(row) if not is_attackers(key)]
    return row.arm, row.tau if row.lam else None, *settings


def find_attackers(points: Points, recipes: Mapping[str, Recipe]) -> list[Attacker]:
    """The attackers of all points, that of the main attack first, the others by name.

    Where one attack was run with several recipes, the settings in which these differ are named.
    """
    groups: dict[str, dict[Key, dict[Key, Curve]]] = {}
    for curve in make_curves(points):
        row = curve.points[0].row
        group = groups.setdefault(str(row.attack), {}).setdefault(attacker_of(row), {})
        group[defence_of(row)] = curve
    emptied = find_emptied(points)
    attackers = []
    for name in sorted({*groups, *emptied}, key=lambda name: (name != main_attack(points), name)):
        found = list(groups.get(name, {}).values()) or [{}]
        rows = [curve.points[0].row for curves in found for curve in curves.values()]
        differing = list(filter(is_attackers, results.differing(rows, results.SEEDS)))
        label = title_of(recipes, name)
        for curves in found:
            told = [curve.points[0].row for curve in curves.values()][:1] if len(found) > 1 else []
            parts = [
                f"{results.show_name(k)} {show_setting(row.number(k))}" for row in told for k in differing
            ]
            attackers.append(Attacker(name, ", ".join([label, *parts]), curves, emptied.get(name, {})))
    return attackers


def find_emptied(points: Points) -> dict[str, dict[Key, list[str]]]:
    """{attack: {defence: points at which it left no row}}."""
    found: dict[str, dict[Key, list[str]]] = {}
    for row in (point.row for point in points):
        if row.attack and row.student_n is None and row.number("attack_n") == 0:
            where = f"{show_knob(row)}, seed {row.seed}"
            found.setdefault(row.attack, {}).setdefault(defence_of(row), []).append(where)
    return found


def find_defences(attackers: Sequence[Attacker]) -> list[Defence]:
    """The defences that any attacker has students of, in the order of the arms."""
    curves = [(key, curve) for attacker in attackers for key, curve in attacker.curves.items()]
    rows = [point.row for _, curve in curves for point in curve.points]
    names = [key for key in results.differing(rows, results.SEEDS) if not is_attackers(key)]
    groups = {
        key: [point for _, curve in same for point in curve.points]
        for key, same in group_by(curves, lambda pair: pair[0]).items()
    }
    labels = curve_labels(list(groups.values()), names)
    found = [Defence(key, key[0], label) for key, label in zip(groups, labels, strict=True)]
    return sorted(found, key=lambda defence: LABELS.index(defence.arm))


def make_matrix(
    attackers: Sequence[Attacker], levels: Mapping[Axes, Levels], draws: Draws, gaps: Mapping[str, Gap]
) -> list[Cell]:
    """A Cell for each defence and attacker, by each kind of answers, at each price (`gaps`: by answers)."""
    defences = find_defences(attackers)
    return [
        cell
        for axes, chosen in levels.items()
        for defence in defences
        for attacker in attackers
        for cell in make_cells(axes, defence, attacker, chosen, draws, gaps[axes.answers])
    ]


def make_cells(
    axes: Axes, defence: Defence, attacker: Attacker, levels: Levels, draws: Draws, gap: Gap
) -> list[Cell]:
    """The Cells of an attacker against a defence, a level each; one where it is read at its own price."""
    curve, emptied = attacker.curves.get(defence.key), attacker.emptied.get(defence.key)
    blank = Cell(defence.label, defence.arm, attacker.label, attacker.name, axes.answers, axes.price)
    missing = f"{NO_ROW} ({'; '.join(emptied)})" if emptied else NOT_REACHED
    if curve is None or not axes.graded(curve.line):
        return [replace(blank, is_own=True, note=missing if emptied else "no student")]
    own = is_lone(curve)
    points = axes.graded(curve.points if own else curve.line)
    measured, drawn = read_sides(axes, [by_replicate(points)], None if own else levels, draws)
    cells = []
    for i, level in enumerate([None] if own else levels):
        found = {key: values[:, i] for key, values in measured.items() if np.isfinite(values[:, i]).all()}
        cell = replace(blank, level=level, is_own=level is None)
        if not found:
            cells.append(replace(cell, note=missing))
            continue
        if level is None:
            cell = replace(cell, level=float(np.mean([price for price, _ in found.values()])))
        resampled = {key: values[1, :, i] for key, values in drawn.items() if key in found}
        cell = fill_student(cell, found, resampled, draws.missing, len(measured))
        cell = fill_gap(cell, curve, found, resampled, gap)
        cells.append(replace(cell, flags=tuple(flags_of(axes, curve, found, level))))
    return cells


def fill_student(cell: Cell, found: Readings, drawn: Readings, missing: str, num_measured: int) -> Cell:
    """The cell with its accuracy, the mean over seeds, and that one's interval."""
    values = np.array([share for _, share in found.values()])
    low, high, note = interval_of(values, list(drawn.values()), missing, least=0.0)
    reached = f"{len(found)} of {num_measured} seeds reach it" if len(found) < num_measured else ""
    note = "; ".join(filter(None, (note, reached)))
    return replace(cell, student=float(values.mean()), low=low, high=high, num_seeds=len(found), note=note)


def fill_gap(cell: Cell, curve: Curve, found: Readings, drawn: Readings, gap: Gap) -> Cell:
    """The cell with its share of the gap: the mean over seeds of each seed's own."""
    rows = {point.row.replicate: point.row for point in curve.points}
    shares = [gap.share(rows[key], float(share)) for key, (_, share) in found.items()]
    if any(share is None for share in shares):
        return replace(cell, gap_note="no gap to share in, or no undistilled student")
    resampled = [gap.drawn_share(rows[key], students) for key, students in drawn.items()]
    kept = [students for students in resampled[:1] if students is not None]
    low, high, _ = interval_of(np.array(shares), kept, "", -np.inf, np.inf)
    return replace(cell, gap=float(np.mean(shares)), gap_low=low, gap_high=high)


def flags_of(axes: Axes, curve: Curve, found: Readings, level: float | None) -> list[str]:
    """What makes a reading doubtful, as it does a comparison of two curves."""
    texts: dict[str, None] = {}
    if level is None:
        return []
    for key, points in by_replicate(curve.line).items():
        for line in directions(points) if key in found else ():
            flags = line_flags(axes, line, level, widest_bracket(axes, [line]))
            texts |= dict.fromkeys(f"{kind}: {case}" for kind, case in flags)
    return list(texts)
