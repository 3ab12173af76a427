"""All that a report says of attackers, gathered once: their students, prices and spending."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ads.report import results
from ads.report.attackers import (
    Attacker,
    Cell,
    Defence,
    defence_of,
    find_attackers,
    find_defences,
    make_matrix,
    of_main_attack,
)
from ads.report.bootstrap import Draws, draw_accuracies, read_tests
from ads.report.compare import Levels, Match, compare_arms, levels_at
from ads.report.curves import Axes, Curve, Points, by_setting, group_by, knobs, make_curves, pair_up, pooled
from ads.report.experiments import Recipe, read_beside, title_of
from ads.report.gap import Gap, measure_gap
from ads.report.numbers import is_number
from ads.report.results import PRICES, ResultRow, Rows, answers_of
from ads.report.worst import WORST, Choice, worst_students

Line = dict[str, Any]
THREAT = ("labels", "clean_traces", "queries", "models")
SPENT = ("published_tokens", "read_tokens", "trained_tokens", "defender_seconds", "attacker_seconds")
MADE_OF = ("finished", "right_of_finished", "right_unfinished", "loops")  # of accuracies by raw answers
OF_ATTACKER = ("samples", "attack", "model")  # stages that an attacker pays for


@dataclass(frozen=True)
class Attacked:
    """Empty where an experiment has one attack alone.

    `curves`, `matches`: of the worst students; `lines`: all attackers at each setting, the worst student
    among them; `own_lines`: students that were trained on no published trace.
    """

    attackers: Sequence[Attacker] = ()
    defences: Sequence[Defence] = ()
    cells: Sequence[Cell] = ()
    gaps: Mapping[str, Gap] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    missing: Mapping[str, Points] = field(default_factory=dict)  # attackers of some points alone, by name
    curves: Sequence[Curve] = ()
    matches: Sequence[Match] = ()
    lines: Sequence[Line] = ()
    own_lines: Sequence[Line] = ()

    @property
    def attacks(self) -> list[str]:
        """The attacks on published traces, by name."""
        return list(dict.fromkeys(attacker.name for attacker in self.attackers))

    @property
    def compared(self) -> list[str]:
        """Those that the worst student is chosen among."""
        return [name for name in self.attacks if name not in self.missing]


def gather_attacked(
    points: Points, undistilled: Points, own: Points, recipes: Mapping[str, Recipe], levels: Levels | None
) -> Attacked:
    attackers = find_attackers(points, recipes)
    if len({attacker.name for attacker in attackers}) < 2 and not own:
        return Attacked()
    tests, missing = read_tests(part for point in (*points, *undistilled) for part in point.parts)
    names = {attacker.name for attacker in attackers}
    choices, lacking = worst_students(points, tests) if len(names) > 1 else ([], {})
    worst = make_curves(choice.point for choice in choices)
    if worst:  # which needs the tests' answers
        attackers.insert(
            0, Attacker(WORST, WORST, {defence_of(curve.points[0].row): curve for curve in worst})
        )
    curves = [curve for attacker in attackers for curve in attacker.curves.values()]
    of_base = [key for key in tests if key[0] in [point.stages["student"]["path"] for point in undistilled]]
    draws = Draws(draw_accuracies(curves, tests, of_base), missing)
    main = of_main_attack(points)
    pairs, answered = pair_up(make_curves(main)), answers_of([point.row for point in points])
    axes = [Axes(answers, price) for answers in answered for price in PRICES]
    gaps = {answers: measure_gap(main, undistilled, answers, draws) for answers in answered}
    cells = make_matrix(attackers, {a: levels_at(pairs, a, levels) for a in axes}, draws, gaps)
    published = [attacker for attacker in attackers if attacker.name != WORST]
    matches, lines = compare_arms(worst, levels, draws), attacker_lines(attackers, recipes)
    found = published, find_defences(attackers), cells, gaps, choices, lacking, worst, matches, lines
    return Attacked(*found, own_lines(own, recipes))


def attacker_lines(attackers: Sequence[Attacker], recipes: Mapping[str, Recipe]) -> list[Line]:
    """The lines of attackers.csv: each attacker at each setting of each defence, means over seeds."""
    cache: dict[Any, Any] = {}
    lines = []
    for defence in find_defences(attackers):
        for attacker in (attacker for attacker in attackers if defence.key in attacker.curves):
            points = attacker.curves[defence.key].points
            for (tau, lam), rows in by_setting(points).items():
                same = [point for point in points if knobs(point.row) == (tau, lam)]
                line: Line = {"defence": defence.label, "arm": defence.arm, "tau": tau, "lam": lam}
                line |= {"attacker": attacker.label, "attack": attacker.name}
                found = line_of(attacker.name, rows, same, (*MADE_OF, *SPENT), recipes, cache)
                lines.append(line | found)
    return lines


def own_lines(own: Points, recipes: Mapping[str, Recipe]) -> list[Line]:
    """The students that hang on no published trace, one line an attack."""
    cache: dict[Any, Any] = {}
    lines = []
    for name, same in group_by(own, lambda point: str(point.row.attack)).items():
        rows = [point.row for point in same]
        line: Line = {"attacker": title_of(recipes, name), "attack": name}
        line |= line_of(name, rows, same, ("trained_tokens", "attacker_seconds"), recipes, cache)
        emptied = [row for row in rows if row.student_n is None and row.number("attack_n") == 0]
        line |= {"note": f"no row left in {len(emptied)} of {len(rows)} seeds"} if emptied else {}
        lines.append(line)
    return lines


def card_lines(lines: Iterable[Line]) -> list[Line]:
    """A line an attacker: its threat card, and what is spent on a point, means over points."""
    return [
        {key: same[0].get(key) for key in ("attacker", *THREAT)} | dict.fromkeys(SPENT) | means(same, SPENT)
        for same in group_by(lines, lambda line: line["attacker"]).values()
    ]


def line_of(
    attack: str,
    rows: Rows,
    points: Points,
    names: Iterable[str],
    recipes: Mapping[str, Recipe],
    cache: dict[Any, Any],
) -> Line:
    """Of one attack's students at one setting: accuracies with intervals over `rows`, what they are made of
    and what was spent, by `names`, over `points`."""
    parts = [part for point in points for part in point.parts]
    found = [spent(part.stages, cache) | made_of(part.stages.get("student"), cache) for part in parts]
    threat = recipes[attack].threat if attack in recipes else {}
    line: Line = {"seeds": len(rows)} | accuracies(rows) | means(found, names) | passed(rows)
    return line | {name: threat.get(name) for name in THREAT}


def means(lines: Iterable[Line], names: Iterable[str]) -> Line:
    """{name: mean} over the lines that have a number there; without those that none has."""
    found = {name: [line[name] for line in lines if is_number(line.get(name))] for name in names}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def accuracies(rows: Sequence[ResultRow]) -> Line:
    """Teacher's and student's, by each kind of answers, with the 95 % intervals of pooled_interval."""
    line: Line = {}
    for who in results.TESTS:
        for answers in results.ANSWERS:
            tested = [row for row in rows if row.accuracy(who, answers).is_share]
            if tested:
                numbers = zip(("accuracy", "low", "high"), pooled(tested, who, answers), strict=True)
                line |= {f"{who}_{answers}_{name}": number for name, number in numbers}
    return line


def passed(rows: Sequence[ResultRow]) -> Line:
    """{pass_at_K_ANSWERS: share} of students that were sampled several times, means over seeds."""
    line: Line = {}
    for answers in results.ANSWERS:
        start = f"student_pass_at_{answers}_"
        for column in dict.fromkeys(c for row in rows for c in row.columns if c.startswith(start)):
            values = [row.number(column) for row in rows if is_number(row.number(column))]
            line[f"pass_at_{column.removeprefix(start)}_{answers}"] = float(np.mean(values))
    return line


def made_of(test: Mapping[str, Any] | None, cache: dict[Any, Any]) -> Line:
    """accuracy = finished * right_of_finished + right_unfinished, by raw answers; and the share of loops.

    The middle two need the answers beside the sidecar.
    """
    if not test:
        return {}
    line: Line = {key: test["stats"].get(key) for key in ("finished", "loops")}
    columns = read_cached(test, ("finished", "is_raw_correct"), cache)
    if columns and any(columns["finished"]):
        pairs = list(zip(columns["finished"], columns["is_raw_correct"], strict=True))
        line["right_of_finished"] = float(np.mean([right for finished, right in pairs if finished]))
        line["right_unfinished"] = float(np.mean([right and not finished for finished, right in pairs]))
    return line


def spent(stages: Mapping[str, Any], cache: dict[Any, Any]) -> Line:
    """Tokens that the teacher published, that the attacker had to get and that the student was trained on,
    once over; and the seconds of either side's stages."""
    train, attack = stages.get("train"), stages.get("attack")
    columns = read_cached(train, ("num_tokens",), cache) if train else None
    published = sum(columns["num_tokens"]) if columns else None
    return {
        "published_tokens": published,
        "read_tokens": attack["stats"].get("tokens_read", published) if attack else published,
        "trained_tokens": attack["stats"].get("tokens") if attack else published,
        "defender_seconds": train.get("seconds") if train else None,
        "attacker_seconds": sum(stages[name].get("seconds", 0) for name in OF_ATTACKER if name in stages),
    }


def read_cached(sidecar: Mapping[str, Any], columns: tuple[str, ...], cache: dict[Any, Any]) -> Line | None:
    """Columns of the table beside a sidecar, each table read once; None where they are not there."""
    key = sidecar["path"], columns
    if key not in cache:
        cache[key] = read_beside(sidecar, columns)
    return cache[key]
