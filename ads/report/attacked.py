"""All that a report says of attackers, gathered once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from ads.report.curves import Axes, Curve, Points, make_curves, pair_up
from ads.report.details import Line, attacker_lines, own_lines
from ads.report.gap import Gap, measure_gap
from ads.report.recipes import Recipe
from ads.report.results import PRICES, answers_of
from ads.report.worst import WORST, Choice, worst_students


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
    draws = Draws(draw_accuracies([(curve,) for curve in curves], tests, of_base), missing)
    main = of_main_attack(points)
    pairs, answered = pair_up(make_curves(main)), answers_of([point.row for point in points])
    axes = [Axes(answers, price) for answers in answered for price in PRICES]
    gaps = {answers: measure_gap(main, undistilled, answers, draws) for answers in answered}
    cells = make_matrix(attackers, {a: levels_at(pairs, a, levels) for a in axes}, draws, gaps)
    published = [attacker for attacker in attackers if attacker.name != WORST]
    matches, lines = compare_arms(worst, levels, draws), attacker_lines(attackers, recipes)
    found = published, find_defences(attackers), cells, gaps, choices, lacking, worst, matches, lines
    return Attacked(*found, own_lines(own, recipes))
