"""The frontier of the worst students: what each defence leaves to the best attacker, against its price."""

import functools
from collections.abc import Sequence
from typing import Any

from ads.report.attacked import Attacked
from ads.report.curves import Axes, all_rows
from ads.report.details import Line
from ads.report.drawn import Drawn, show_shares
from ads.report.looks import COLOURS, OWN
from ads.report.plots import Panel, draw_tradeoff
from ads.report.results import PRICES, Rows, distinct_answers


def make_panels(attacked: Attacked, baselines: Rows) -> dict[str, list[Panel]]:
    """{"worst": a panel for each kind of answers and each price}; none without several attackers."""
    rows, panels = all_rows(attacked.curves), []
    for answers, name in distinct_answers(rows).items() if rows else ():
        for axes in (Axes(answers, price) for price in PRICES):
            if axes.graded_rows(rows):
                price = "" if axes.price == "accuracy" else f", price in {PRICES[axes.price].short}"
                draw = functools.partial(draw_worst, axes, attacked, baselines)
                title = f"Worst student: {name} answers{price}"
                panels.append(Panel(title, draw, axes.price, answers))
    return {"worst": panels} if panels else {}


def draw_worst(axes: Axes, attacked: Attacked, baselines: Rows, axis: Any) -> Drawn:
    """The worst students' curves as those of one attack are drawn, and what needs no published trace."""
    drawn = draw_tradeoff(axes, attacked.curves, baselines, None, axis)
    style = {"color": COLOURS["undistilled"], "linestyle": OWN.of_line, "linewidth": 1.4}
    for line in own_of(attacked.own_lines, axes.answers):
        share, low, high = (line[f"student_{axes.answers}_{name}"] for name in ("accuracy", "low", "high"))
        axis.axhline(share, label=line["attacker"], **style)
        drawn.add((line["attacker"], "-", "-", show_shares((share, low, high)), str(line["seeds"])))
    return drawn


def own_of(lines: Sequence[Line], answers: str) -> list[Line]:
    return [line for line in lines if f"student_{answers}_accuracy" in line]
