"""The frontier of the worst students: what each defence leaves to the best attacker, against its price."""

import functools
from collections.abc import Sequence
from typing import Any

from ads.report.attacked import Attacked
from ads.report.curves import Axes, all_rows
from ads.report.details import Line
from ads.report.looks import COLOURS, OWN
from ads.report.plots import Panel, draw_tradeoff
from ads.report.results import ANSWERS, PRICES, Rows, answers_of


def make_panels(attacked: Attacked, baselines: Rows) -> dict[str, list[Panel]]:
    """{"worst": a panel for each kind of answers and each price}; none without several attackers."""
    rows, panels = all_rows(attacked.curves), []
    for answers in answers_of(rows) if rows else ():
        for axes in (Axes(answers, price) for price in PRICES):
            if axes.graded_rows(rows):
                price = "" if axes.price == "accuracy" else f", price in {PRICES[axes.price].short}"
                draw = functools.partial(draw_worst, axes, attacked, baselines)
                panels.append(Panel(f"Worst student: {ANSWERS[answers]} answers{price}", draw, axes.price))
    return {"worst": panels} if panels else {}


def draw_worst(axes: Axes, attacked: Attacked, baselines: Rows, axis: Any) -> None:
    """The worst students' curves as those of one attack are drawn, and what needs no published trace."""
    draw_tradeoff(axes, attacked.curves, baselines, None, axis)
    for line in own_of(attacked.own_lines, axes.answers):
        share = line[f"student_{axes.answers}_accuracy"]
        axis.axhline(
            share, color=COLOURS["undistilled"], linestyle=OWN.of_line, linewidth=1.4, label=line["attacker"]
        )


def own_of(lines: Sequence[Line], answers: str) -> list[Line]:
    return [line for line in lines if f"student_{answers}_accuracy" in line]
