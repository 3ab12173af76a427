"""The worst student of a defence: what it leaves to the attacker that gets the most out of its traces.

The highest of several test accuracies is too high an estimate of what the best attacker knows: part of it
is luck with these problems. So the attacker is chosen on one half of the problems and reported on the other,
and the same with the halves exchanged; each problem counts once.

The best of sixteen attackers gets more than the best of three, so all points have the same attackers: those
that every point has a student of, points that were copied as they are alone (naive) left out.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ads.data.traces import wilson_interval
from ads.report.attackers import defence_of, is_attackers
from ads.report.bootstrap import Test
from ads.report.curves import Point, Points, group_by, pool_copies
from ads.report.results import ANSWERS, SEEDS, read_row

WORST = "worst student"
KEPT = ("student", "student_seed")  # of the attacker's columns: whose accuracy it is
HALVES = (0, 1)


@dataclass(frozen=True)
class Choice:
    """The worst student of one point and replicate: by each kind of answers the attack that was chosen on
    each half of the problems."""

    point: Point
    attacks: Mapping[str, tuple[str, ...]]


def half_of(problem: str) -> int:
    """0 or 1, by the problem's id alone: the same for all students of all experiments."""
    return hashlib.sha256(problem.encode()).digest()[0] % 2


def cross_fit(tests: Sequence[Test]) -> tuple[Test, tuple[int, ...]]:
    """(answers of the worst of some students, the student chosen on each half of the problems).

    The answers to the problems of a half are those of the student who is best on the other half; of equals it
    is the first. Problems count that all students were tested on. No answers where a half has no problem.
    """
    shared = [problem for problem in tests[0] if all(problem in test for test in tests)]
    halves = [[problem for problem in shared if half_of(problem) == half] for half in HALVES]
    if not all(halves):
        return {}, ()
    chosen = tuple(int(np.argmax([sum(test[p] for p in half) for test in tests])) for half in halves)
    return {p: tests[chosen[1 - half]][p] for half in HALVES for p in halves[half]}, chosen


def worst_students(points: Points, tests: dict[tuple, Test]) -> tuple[list[Choice], dict[str, list[Point]]]:
    """The worst student of each point and replicate, and the points that lack an attacker of others, by who.

    `tests` are the answers by (path of the sidecar, answers); the worst students' are added to them.
    """
    choices: list[Choice] = []
    attacked, missing = points_attacked(points)
    for same in attacked:
        path, attacks = Path(WORST, str(len(choices))), {}
        for answers in ANSWERS:
            found = {id(point): mean_test(point, answers, tests) for point in same}
            kept = [point for point in same if found[id(point)]]
            worst, chosen = cross_fit([found[id(point)] for point in kept]) if kept else ({}, ())
            if worst:
                tests[path, answers] = worst
                attacks[answers] = tuple(str(kept[i].row.attack) for i in chosen)
        if attacks:
            answered = {answers: tests[path, answers] for answers in attacks}
            choices.append(Choice(worst_point(same[0], path, answered), attacks))
    return choices, missing


def points_attacked(points: Points) -> tuple[list[list[Point]], dict[str, list[Point]]]:
    """(each attacked point and replicate, with the attackers that all of these have; the points that lack an
    attacker of others, by who). An attacker whom the traces left nothing to train on took part."""
    tried = [p for p in points if p.row.student_n is not None or p.row.number("attack_n") == 0]
    groups = list(group_by(pool_copies(tried), who_is_compared).values())
    attackers = [{str(point.row.attack) for point in same} for same in groups]
    several = [(same, names) for same, names in zip(groups, attackers, strict=True) if len(names) > 1]
    everywhere = set.intersection(*(names for _, names in several)) if several else set()
    missing = {
        name: [same[0] for same, names in several if name not in names]
        for name in sorted(set().union(*(names for _, names in several)) - everywhere)
    }
    return [[p for p in same if p.row.attack in everywhere] for same, _ in several], missing


def who_is_compared(point: Point) -> tuple:
    """What the students of one defence's point and replicate have in common."""
    row = point.row
    return defence_of(row), row.student, row.tau, row.lam, *map(row.number, SEEDS)


def mean_test(point: Point, answers: str, tests: Mapping[tuple, Test]) -> Test:
    """The answers of a point's student; of copies the share that is right. Empty where any is missing."""
    found = [tests.get((part.stages["student"]["path"], answers), {}) for part in point.parts]
    shared = [problem for problem in found[0] if all(problem in test for test in found)]
    return {problem: float(np.mean([test[problem] for test in found])) for problem in shared}


def worst_point(point: Point, path: Path, answered: Mapping[str, Test]) -> Point:
    """A point with the worst student in the place of its own."""
    columns: dict[str, Any] = {key: value for key, value in point.row.columns.items() if not is_students(key)}
    columns |= {"attack": WORST, "student_n": min(map(len, answered.values()))}
    for answers, test in answered.items():
        num_correct = sum(test.values())
        low, high = wilson_interval(round(num_correct), len(test))
        shares = {"accuracy": num_correct / len(test), "low": low, "high": high}
        columns |= {f"student_{answers}_{key}": value for key, value in shares.items()}
    stages = {**point.stages, "student": {"path": path, "stats": {}, "config": {}}}
    return Point(read_row(columns), {name: stages[name] for name in ("teacher", "train", "student")})


def is_students(key: str) -> bool:
    """Whether a column is of one attacker's student."""
    is_number = key.startswith(("student_", "model_", "attack_"))
    return key not in KEPT and (is_attackers(key) or is_number or key == "recipe")
